"""One run at a time in a checkpoint folder."""

import fcntl
import os
import socket
import time
from pathlib import Path

from megatron_taipan.errors import UserError


class FolderLock:
    """Held while entered. It is a lock of the operating system, so a process that dies leaves none behind.

    Raises:
        UserError: on entering, when another process holds it; the message names its host and process.
    """

    def __init__(self, directory: Path):
        self.path = directory / "lock"

    def __enter__(self) -> "FolderLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+")
        except OSError as error:
            raise UserError(f"checkpoint.dir={self.path.parent} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "an unknown process"
            self.file.close()
            raise UserError(
                f"{self.path.parent} is in use by {holder}; wait for it, end it, or choose another checkpoint.dir"
            ) from None
        except OSError:
            return self  # a file system without locks: nothing to hold, and no reason not to train
        self.file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {started}\n")
        self.file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
