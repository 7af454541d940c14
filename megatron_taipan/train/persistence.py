"""What a run does so that its work reaches the disk: it watches its folder, and retries its last checkpoint."""

import time

from megatron_taipan.checkpoint.lock import FolderHeld, FolderLock
from megatron_taipan.checkpoint.metadata import Progress
from megatron_taipan.checkpoint.saving import SaveFailed
from megatron_taipan.checkpoint_config import CheckpointConfig
from megatron_taipan.errors import EXIT_UNSAVED, UserError
from megatron_taipan.train.metrics import Metrics
from megatron_taipan.train.saver import Saver
from megatron_taipan.train.watchdog import Watchdog


class Unsaved(UserError):
    """The state at the end of a run could not be written; the checkpoints before it are whole."""

    exit_status = EXIT_UNSAVED


class FolderGuard:
    """Checks that the run's folder still exists and that only this run uses it; for rank 0."""

    def __init__(self, lock: FolderLock, metrics: Metrics):
        self.lock, self.metrics = lock, metrics
        self.reported = False  # that the folder is gone and cannot be created again

    def check(self) -> None:
        """Creates a vanished folder again, with an alarm: training goes on, and the next checkpoint goes there.

        Raises:
            FolderHeld: another run has taken the folder meanwhile.
        """
        if not self.lock.lost():
            return
        try:
            self.lock.renew()
        except FolderHeld:
            raise
        except UserError as error:
            if not self.reported:
                self.metrics.note("alarm", f"the run's folder vanished, and {error}; it is tried again at every step")
            self.reported = True
            return
        self.reported = False
        self.metrics.note(
            "alarm",
            f"{self.lock.path.parent} vanished and was created again; the checkpoints that were in it are gone, the"
            " next one will be there",
        )


def save_with_retry(
    saver: Saver,
    progress: Progress,
    checkpoint: CheckpointConfig,
    *,
    guard: FolderGuard | None,
    metrics: Metrics,
    watchdog: Watchdog,
) -> None:
    """Saves and waits; tries again while the disk refuses, which leaves time to free space; collective.

    Raises:
        Unsaved: on all ranks, when checkpoint.last_tries tries have failed.
        UserError: on all ranks, if the state is not finite; see Saver.
    """
    for left in reversed(range(checkpoint.last_tries)):
        if guard is not None:
            guard.check()
        try:
            return saver.save_last(progress)
        except SaveFailed as failure:
            if not left:
                raise Unsaved(
                    f"{failure}. The last {checkpoint.last_tries} tries to save step {progress.step} failed"
                    " (checkpoint.last_tries); the checkpoints before it are whole. Free some space, then start the"
                    " same command again: it continues from the newest one"
                ) from failure
            metrics.note(
                "alarm", f"step {progress.step}: {failure}; tried again in {checkpoint.retry_s:g} s, {left} times"
            )
        watchdog.beat()
        time.sleep(checkpoint.retry_s)
