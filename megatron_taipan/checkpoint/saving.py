"""Writing a checkpoint behind the training, by all ranks together."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_taipan.checkpoint import folder
from megatron_taipan.checkpoint.files import TEMPORARY, write_tensors
from megatron_taipan.checkpoint.metadata import Progress
from megatron_taipan.checkpoint.reader import INDEX
from megatron_taipan.checkpoint.snapshot import Snapshot, join_indices
from megatron_taipan.config import Config
from megatron_taipan.config_text import dump_config
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.all_ranks import attempt_on_all_ranks, gather_objects


class SaveFailed(UserError):
    """A checkpoint could not be written; the one before is untouched, and training may go on."""


class Saving:
    """A snapshot on its way to the disk; made and finished by all ranks together.

    A thread writes it while training goes on. Neither DeepSpeed's own asynchronous engines (they need a GPU or packages
    of their own) nor torch.distributed.checkpoint (it knows no ZeRO partitions) fit here; one thread that writes one
    file needs no engine.

    Args:
        kind: `folder.FULL`, or `folder.WEIGHTS` for a snapshot without moments.

    Raises:
        SaveFailed: on all ranks, if the folder cannot be made.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        directory: Path,
        progress: Progress,
        *,
        config: Config,
        metadata: dict[str, Any],
        kind: str = folder.FULL,
    ):
        self.snapshot, self.progress, self.config, self.metadata, self.kind = snapshot, progress, config, metadata, kind
        self.final = directory / folder.folder_name(progress.step, kind)
        self.temporary = directory / (self.final.name + TEMPORARY)
        save_on_all_ranks(self._make_folder)
        self.written: dict[str, tuple[int, str]] = {}
        self.fault: Exception | None = None
        self.seconds = 0.0  # of this rank's writing
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def writing(self) -> bool:
        """Whether this rank's part is still being written."""
        return self.thread.is_alive()

    def finish(self) -> Path:
        """Waits for every rank's part and completes the checkpoint; collective. Returns its folder.

        Raises:
            SaveFailed: on all ranks, if any of them could not write; what was written is removed.
        """
        self.thread.join()
        try:
            save_on_all_ranks(self._raise_fault)
            shares = gather_objects((self.written, self.snapshot.index))
            save_on_all_ranks(lambda: self._complete(shares) if dist.get_rank() == 0 else None)
        except SaveFailed:
            if dist.get_rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)  # a full disk has better use for the space
            raise
        return self.final

    def _make_folder(self) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
            os.makedirs(self.temporary / folder.STATE)

    def _write(self) -> None:
        began = time.perf_counter()
        file = f"{folder.STATE}/{self.snapshot.file}"
        try:
            self.written = {file: write_tensors(self.temporary / file, self.snapshot.tensors)}
        except Exception as error:  # whatever it is, this thread cannot raise it, and the file is not there
            self.fault = error
        self.seconds = time.perf_counter() - began

    def _raise_fault(self) -> None:
        if self.fault is not None:
            raise self.fault

    def _complete(self, shares: list[tuple[dict, dict]]) -> None:
        progress = asdict(self.progress)
        if not self.progress.finished:  # as releases before stages write and read it
            del progress["finished"]
        description = {
            "format": folder.FORMAT, "contents": self.kind, "progress": progress, **self.metadata,
        }  # fmt: skip
        texts = {
            INDEX: json.dumps(join_indices([index for _, index in shares]) | self.snapshot.whole),
            folder.CONFIG: dump_config(self.config),
            folder.METADATA: json.dumps(description, indent=1),
        }
        folder.complete_checkpoint(
            self.temporary, self.final, texts, {k: v for written, _ in shares for k, v in written.items()}
        )


def save_on_all_ranks(action: Callable[[], Any]) -> Any:
    """Runs `action`; if it fails on any rank, SaveFailed is raised on all."""
    result, fault = attempt_on_all_ranks(action, Exception, _described)
    if fault is not None:
        rank, text = fault
        raise SaveFailed(f"the checkpoint was not written: rank {rank}: {text}")
    return result


def _described(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename or 'checkpoint.dir'})"
    return f"{type(error).__name__}: {error}"
