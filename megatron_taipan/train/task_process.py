"""`python -m megatron_taipan.train.task_process PARENT TIMEOUT_S COMMAND...`: a task that cannot outlive its run.

Runs COMMAND at the lowest priority, and ends it, its children included, when the time is up, when SIGTERM comes, or
when process PARENT is no longer its parent: a run that is killed can end nothing itself. Imports nothing heavy, since
it stays beside the command all the time.

Exit status: the command's, 128 + N if signal N ended it, 124 when the time was up (as of timeout(1)).
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

POLL_S = 0.2
GRACE_S = 5.0  # from SIGTERM to SIGKILL
TIMED_OUT = 124


def main(arguments: list[str]) -> int:
    """Runs the command; gives the status."""
    parent, timeout_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    os.nice(19)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + timeout_s
    while (status := child.poll()) is None:
        late = time.monotonic() > end
        if late or asked or os.getppid() != parent:
            end_group(child)
            return TIMED_OUT if late else 128 + signal.SIGTERM
        time.sleep(POLL_S)
    with suppress(ProcessLookupError):  # what it left in the background would read a checkpoint that is not kept for it
        os.killpg(child.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status


def end_group(child: subprocess.Popen) -> None:
    """Ends a process that leads a session, and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    # children of a leader that ended at SIGTERM got SIGKILL in the second round


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
