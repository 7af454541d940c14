"""What a run says about itself: a JSONL of every step, TensorBoard events, and a line for whoever watches."""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from megatron_taipan.checkpoint.state import Progress
from megatron_taipan.config import Config
from megatron_taipan.train.evaluate import Evaluation
from megatron_taipan.train.peaks import device_name, known_peak
from megatron_taipan.train.step import StepResult

LOG = "log.jsonl"


@dataclass
class Summary:
    """A run in a few numbers."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of the steps; validations and checkpoints not counted
    first_loss: float | None = None
    last_loss: float | None = None
    skipped: int = 0
    saves: int = 0
    stall_s: float = 0.0  # training stood still for checkpoints

    def add(self, result: StepResult, tokens: int, seconds: float) -> None:
        self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + seconds
        self.skipped += result.skipped
        if not result.skipped:
            self.first_loss = result.ce if self.first_loss is None else self.first_loss
            self.last_loss = result.ce

    def text(self) -> str:
        speed = f"{self.tokens / self.seconds:,.0f} tokens/s" if self.seconds else "no steps"
        loss = f"loss {self.first_loss:.4f} -> {self.last_loss:.4f}" if self.first_loss is not None else "no loss"
        return (
            f"{self.steps} steps, {self.tokens:,} tokens in {duration(self.seconds)} ({speed}), {loss},"
            f" {self.skipped} skipped, {self.saves} checkpoints in {self.stall_s:.1f} s"
        )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Metrics:
    """Rank 0 writes; on other ranks every method does nothing.

    Speed is measured between steps, so it includes waiting for data and the validation's own time is left out.
    """

    def __init__(self, config: Config, start: Progress, *, flops_per_token: float, devices: int, writes: bool):
        self.config, self.writes = config, writes
        self.flops, self.devices = flops_per_token, devices
        self.peak = config.log.peak_tflops or known_peak(device_name())
        self.step, self.end = start.step, min(config.train.stop_at or config.train.steps, config.train.steps)
        self.summary = Summary()
        self.step_seconds: float | None = None  # smoothed, for the time left
        self.lap = time.perf_counter()
        self.jsonl: TextIO | None = None
        self.board: Any = None
        self.bar: tqdm | None = None
        if not writes:
            return
        folder = Path(config.checkpoint.dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.jsonl = open(folder / LOG, "a", buffering=1)
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            # purge_step hides what a killed run wrote after the checkpoint that this one continues from
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start.step + 1)
        if config.log.progress and sys.stderr.isatty():
            self.bar = tqdm(total=self.end, initial=start.step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        """Says what was done, however the run ended, and closes everything."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.summary.steps:
            self.note("end", self.summary.text(), **vars(self.summary))
        if self.board is not None:
            self.board.close()
        if self.jsonl is not None:
            self.jsonl.close()

    def start_clock(self) -> None:
        """A step begins: what happened since the last one (validation, a checkpoint) is not part of its time."""
        self.lap = time.perf_counter()

    def seconds(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self.lap

    def after_step(self, step: int, result: StepResult, *, lr: float, tokens: int, data_wait_s: float) -> None:
        """Records a finished step.

        Args:
            step: steps taken, this one included.
            tokens: of this step, over all ranks.
            data_wait_s: seconds that this rank waited for its batches.
        """
        if not self.writes:
            return
        seconds, self.step = self.seconds(), step
        self.summary.add(result, tokens, seconds)
        self.step_seconds = seconds if self.step_seconds is None else 0.9 * self.step_seconds + 0.1 * seconds
        speed = tokens / seconds
        values = {
            "loss": result.loss, "ce": result.ce, "budget": result.budget, "grad_norm": result.grad_norm,
            "lr": lr, "skipped": int(result.skipped), "step_s": seconds, "tokens": tokens, "tokens_per_s": speed,
            "data_wait_s": data_wait_s,
        }  # fmt: skip
        if self.peak:
            values["mfu"] = 3 * self.flops * speed / (self.peak * 1e12 * self.devices)
        if torch.cuda.is_available():
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        for index, gate in enumerate(result.gates):
            values |= {f"gate{index}/{name}": value for name, value in gate.items()}
        self._write({"event": "step", "step": step, **values})
        if step % self.config.log.every == 0 or step == self.end:
            for name, value in values.items():
                self._chart(f"train/{name}", value, step)
            mfu = f"MFU {values['mfu']:.1%}  " if "mfu" in values else ""
            skipped = "  SKIPPED: not finite" if result.skipped else ""
            self._line(
                f"step {step}/{self.end}  loss {result.ce:.4f}  budget {result.budget:.4f}  norm"
                f" {result.grad_norm:.3f}  lr {lr:.2e}  {speed:,.0f} tokens/s  {mfu}{self._left()} left{skipped}"
            )
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {result.ce:.4f}, {speed:,.0f} tokens/s", refresh=False)
            self.bar.update(step - self.bar.n)

    def after_evaluation(self, step: int, evaluation: Evaluation, seconds: float) -> None:
        """Records a validation."""
        if not self.writes:
            return
        values = {"ce": evaluation.ce, "perplexity": evaluation.perplexity, "tokens": evaluation.tokens, "s": seconds}
        for index, gate in enumerate(evaluation.gates):
            values |= {f"gate{index}/{name}": value for name, value in gate.items()}
        self._write({"event": "valid", "step": step, **values})
        for name, value in values.items():
            self._chart(f"valid/{name}", value, step)
        self._line(f"step {step}  validation loss {evaluation.ce:.4f}  perplexity {evaluation.perplexity:.2f}")

    def after_save(self, step: int, path: Path, *, stall: float, write: float) -> None:
        """Records a complete checkpoint: seconds that training stood still for it, and seconds of rank 0's writing."""
        if not self.writes:
            return
        self.summary.saves += 1
        self.summary.stall_s += stall
        self._write({"event": "save", "step": step, "path": str(path), "stall_s": stall, "write_s": write})
        self._chart("checkpoint/stall_s", stall, step)
        self._chart("checkpoint/write_s", write, step)
        self._line(f"step {step}  checkpoint {path}  ({stall:.2f} s of training, {write:.2f} s of writing)")

    def note(self, event: str, text: str, **values: Any) -> None:
        """Records anything else that a reader of the log should know, and says it."""
        if not self.writes:
            return
        self._write({"event": event, "step": self.step, "text": text, **values})
        self._line(text)

    def _left(self) -> str:
        return duration((self.step_seconds or 0) * max(self.end - self.step, 0))

    def _write(self, record: dict[str, Any]) -> None:
        if self.jsonl is not None:
            # JSON knows no infinities
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            self.jsonl.write(json.dumps({"time": round(time.time(), 3), **values}, allow_nan=False) + "\n")

    def _chart(self, name: str, value: float, step: int) -> None:
        if self.board is not None:
            self.board.add_scalar(name, value, step)

    def _line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
