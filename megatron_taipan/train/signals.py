"""What stops a run early: the step is finished, a checkpoint written, and the exit status says why."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

# SLURM sends SIGTERM before it takes the nodes away, and what `--signal` names before the time limit; Ctrl-C is SIGINT.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# One Ctrl-C arrives twice under a launcher: from the terminal, and passed on.
ONE_PRESS_S = 2.0


class StopSignals:
    """While entered, records a stopping signal instead of ending; a second Ctrl-C, seconds later, ends at once."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self.received: str | None = None
        self.launcher = Launcher(env)
        self._interrupted = 0.0

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self) -> str | None:
        """Why this rank wants to stop; None if it does not."""
        if self.received is None and self.launcher.gone():
            self.received = "the death of its launcher"
        return self.received

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted and time.monotonic() - self._interrupted > ONE_PRESS_S:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or time.monotonic()
        self.received = signal.Signals(number).name


class Launcher:
    """The torchrun or deepspeed processes above this one.

    A killed launcher leaves its ranks running: they would go on unnoticed, while the same command, started again, is
    refused because they hold the folder. Ranks started in another way are left alone: a shell that ends after
    `nohup python ... &` is not a reason to stop.
    """

    def __init__(self, env: Mapping[str, str]):
        self.chain: list[int] = []
        if "TORCHELASTIC_RUN_ID" in env:
            self.chain = [os.getppid()]
        elif "CROSS_RANK" in env:  # deepspeed: the command itself, and under it the process that started this rank
            self.chain = [os.getppid(), parent_of(os.getppid()) or 0]

    def gone(self) -> bool:
        """Whether one of them has died: its children then get another parent."""
        if not self.chain:
            return False
        if os.getppid() != self.chain[0]:
            return True
        return len(self.chain) > 1 and (parent_of(self.chain[0]) or 0) != self.chain[1]


def parent_of(pid: int) -> int | None:
    """The parent of a process; None where /proc does not say."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
