"""Where messages and numbers of a run go: JSONL, TensorBoard, Weights & Biases, a text file of every rank.

None of them may end a run: a log that cannot be written is reported once, and training goes on.
"""

import json
import logging
import logging.handlers
import math
import os
import sys
import uuid
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_taipan.config import Config
from megatron_taipan.errors import UserError

TEXT_LOG_FOLDER = "logs"


class JsonLines:
    """One JSON object a line, whole lines only; lines that cannot be written wait until there is room again."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: deque[bytes] = deque(maxlen=100_000)
        self.handle: int | None = None

    def write(self, record: dict[str, Any]) -> OSError | None:
        """Adds a record; JSON knows no infinities, so they become null. Returns what went wrong."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.waiting.append(json.dumps(values, allow_nan=False).encode() + b"\n")
        try:
            handle = self._open()
            while self.waiting:
                append_line(handle, self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def _open(self) -> int:
        """Opens the file if it is closed or another one now has its name; removes a last line that is cut in two."""
        if self.handle is not None:
            try:
                if os.path.samestat(os.fstat(self.handle), os.stat(self.path)):
                    return self.handle
            except FileNotFoundError:
                pass
            self.close()
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self.handle).st_size
        start = max(size - (1 << 20), 0)
        tail = os.pread(self.handle, size - start, start)
        if tail and not tail.endswith(b"\n"):  # half a record: the last line of a killed process
            os.ftruncate(self.handle, start + tail.rfind(b"\n") + 1)
        return self.handle


def append_line(handle: int, line: bytes) -> None:
    """Writes a whole line or nothing."""
    size = os.fstat(handle).st_size
    written = os.write(handle, line)
    if written < len(line):  # the disk became full within the line
        os.ftruncate(handle, size)
        raise OSError(28, os.strerror(28))


class TextLog:
    """`logs/rank_00000.log` in the run's folder: rotating, one for every rank, standard library's logging."""

    def __init__(self, config: Config, rank: int):
        self.logger = logging.Logger(f"rank {rank}")  # a separate one: other runs in this process have theirs
        self.handler: logging.Handler | None = None
        if config.log.text_mb:
            file = Path(config.checkpoint.dir) / TEXT_LOG_FOLDER / f"rank_{rank:05d}.log"
            self.handler = _QuietHandler(
                file, maxBytes=int(config.log.text_mb * 1e6), backupCount=config.log.text_files, delay=True
            )
            self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            self.logger.addHandler(self.handler)

    def write(self, text: str, level: int = logging.INFO, **kwargs: Any) -> None:
        self.logger.log(level, text, **kwargs)

    def close(self) -> None:
        if self.handler is not None:
            with suppress(OSError):  # what did not fit on a full disk is lost
                self.handler.close()


class _QuietHandler(logging.handlers.RotatingFileHandler):
    """Makes its folder when it first writes, and again should it vanish; what cannot be written is lost."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not os.path.exists(self.baseFilename):
                os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
                if self.stream:
                    self.stream.close()
                    self.stream = None  # type: ignore[assignment]  # opened again on emit
        except OSError:
            return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def open_boards(config: Config, step: int) -> tuple[list[Any], list[str]]:
    """What draws curves, as configured, and what went wrong.

    Raises:
        UserError: a board was asked for whose package is not installed.
    """
    boards: list[Any] = []
    faults = []
    for wanted, kind in ((config.log.tensorboard, TensorBoard), (config.log.wandb, WeightsAndBiases)):
        if wanted:
            try:
                boards.append(kind(config, step))
            except UserError:
                raise
            except Exception as error:  # whatever the library raises, training goes on
                faults.append(f"{kind.name} is off: {type(error).__name__}: {error}")
    return boards, faults


class TensorBoard:
    """Events in `tensorboard/` of the run's folder."""

    name = "TensorBoard"

    def __init__(self, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        # purge_step hides what a killed run wrote after the checkpoint that this one continues from
        self.writer = SummaryWriter(str(Path(config.checkpoint.dir) / "tensorboard"), purge_step=step + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb.ai, or of `wandb/` in the run's folder where WANDB_MODE=offline; resumed runs go on in it."""

    name = "Weights & Biases"

    def __init__(self, config: Config, step: int):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"log.wandb=true needs the package wandb ({error}): pip install 'megatron-taipan[wandb]', or"
                " log.wandb=false"
            ) from error
        folder = Path(config.checkpoint.dir)
        self.run = wandb.init(
            project=config.log.wandb_project,
            name=config.name,
            id=self._identifier(folder / "wandb.id"),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )
        # steps are taken again after a resume, and its own counter only runs forward
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    @staticmethod
    def _identifier(file: Path) -> str:
        """The same at every start of this run."""
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def close(self) -> None:
        self.run.finish()


def say(text: str) -> None:
    """A line on stderr, which may be a file on a full disk."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
