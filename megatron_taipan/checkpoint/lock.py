"""One run at a time in a checkpoint folder."""

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from megatron_taipan.errors import UserError


class FolderHeld(UserError):
    """Another process runs in the folder."""


class FolderLock:
    """Held while entered. It is a lock of the operating system, so a process that dies leaves none behind.

    Raises:
        FolderHeld: on entering, when another process holds it; the message names its host and process.
        UserError: on entering, when the folder cannot be written.
    """

    def __init__(self, directory: Path):
        self.path = directory / "lock"
        self.file: IO[str] | None = None
        # The loader's workers would hold it with us, and for seconds after we were killed.
        os.register_at_fork(after_in_child=self._let_go)

    def __enter__(self) -> "FolderLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"checkpoint.dir={self.path.parent} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "an unknown process"
            self.file.close()
            raise FolderHeld(
                f"{self.path.parent} is in use by {holder}; wait for it, end it, or choose another checkpoint.dir"
            ) from None
        except OSError:
            return self  # a file system without locks: nothing to hold, and no reason not to train
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        with suppress(OSError):  # a full disk has no room for the holder's name; the lock is held all the same
            self.file.truncate(0)
            os.write(self.file.fileno(), f"process {os.getpid()} on {socket.gethostname()} since {started}\n".encode())
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """In a forked child this closes only the handle of the child."""
        if self.file is not None:
            self.file.close()

    def lost(self) -> bool:
        """Whether the locked file is no longer in the folder, because the folder was moved or deleted."""
        if self.file is None:
            return True
        try:
            return not os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except (OSError, ValueError):  # a closed file: an earlier `renew` failed
            return True

    def renew(self) -> None:
        """Makes the folder and the lock again after `lost`; raises as entering does."""
        self._let_go()
        self.__enter__()
