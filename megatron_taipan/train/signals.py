"""Signals that ask a run to stop: the step is finished, a checkpoint written, and the exit status says why."""

import signal
from types import FrameType

# SLURM sends SIGTERM before it takes the nodes away, and what `--signal` names before the time limit; Ctrl-C is SIGINT.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# 75 is EX_TEMPFAIL of sysexits.h: "try again later". The batch script starts the job again on it.
EXIT_REQUEUE = 75


class StopSignals:
    """While entered, notes a stopping signal instead of dying of it; a second one of the same kind kills at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.Signals(number).name == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
