"""Reports what a process waits for while the processes of a run meet; with a wrong address they never do."""

import socket
import sys
import threading
import time

SAY_EVERY_S = 30.0


class Waiting:
    """While entered, one line on stderr every SAY_EVERY_S seconds, from the first process of each host.

    Args:
        address, port: where rank 0 listens.
        timeout_s: seconds after which the process stops waiting, and option: where the user sets them ("": nowhere).
    """

    def __init__(
        self, *, rank: int, local_rank: int, world_size: int, address: str, port: int, timeout_s: float, option: str
    ):
        self.rank, self.world_size, self.address, self.port, self.timeout_s = rank, world_size, address, port, timeout_s
        self.option = option
        self.speaks = local_rank == 0 and world_size > 1
        self.over = threading.Event()

    def __enter__(self) -> "Waiting":
        self.began = time.monotonic()
        if self.speaks:
            threading.Thread(target=self._speak, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def _speak(self) -> None:
        while not self.over.wait(SAY_EVERY_S):
            text = self.describe()  # looking a name up can take seconds
            if not self.over.is_set():
                print(text, file=sys.stderr, flush=True)

    def describe(self) -> str:
        """What is waited for, since when, until when."""
        if self.rank == 0:
            what = f"the other {self.world_size - 1} processes to reach it on port {self.port} of {self.address}"
        else:
            what = f"rank 0 at {self.address}:{self.port} ({found(self.address)})"
        return (
            f"rank {self.rank} has waited {time.monotonic() - self.began:.0f} s for {what}; it gives up after"
            f" {self.timeout_s:g} s" + (f" ({self.option})" if self.option else "")
        )


def found(address: str) -> str:
    """The address of a host's name as this host resolves it, or that the name is unknown here."""
    try:
        return "that is " + str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        return f"{socket.gethostname()} does not know that name: {error.strerror or error}; set MASTER_ADDR"
