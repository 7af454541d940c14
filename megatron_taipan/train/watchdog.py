"""Ends a run that hangs, and shows the stacks of every rank."""

import faulthandler
import os
import sys
import threading
import time

from megatron_taipan.errors import EXIT_HANG

GRACE_S = 30.0
# Time for the others to print theirs: once a rank has gone, a launcher kills them, and collectives that wait for it
# fail with less to say.
LINGER_S = 3.0


class Watchdog:
    """While entered, a process that does not call `beat` for `seconds` prints the stacks of all its threads and exits.

    A separate thread prints which rank it is. Should the hanging code never release Python's global lock,
    faulthandler, which does not need it, does the same half a minute later.
    """

    def __init__(self, seconds: float, rank: int):
        self.seconds, self.rank = seconds, rank
        self.last = time.monotonic()
        self.ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self.beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """There is progress: the time starts again."""
        self.last = time.monotonic()
        if self.seconds and not self.ended.is_set():
            faulthandler.dump_traceback_later(self.seconds + GRACE_S, exit=True)

    def _watch(self) -> None:
        # monotonic time: a corrected clock neither kills a run nor keeps a dead one
        while not self.ended.wait(max(self.last + self.seconds - time.monotonic(), 0.1)):
            if time.monotonic() - self.last >= self.seconds:
                print(
                    f"rank {self.rank}: nothing was finished for {self.seconds:.0f} s (train.hang_after_s); its stacks"
                    " follow and it ends",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                time.sleep(LINGER_S)
                os._exit(EXIT_HANG)
