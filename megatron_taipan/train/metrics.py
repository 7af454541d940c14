"""What a run reports about itself: a JSONL of every step, curves, text files, and a line on the terminal."""

import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_taipan.checkpoint.metadata import Progress
from megatron_taipan.checkpoint.run_log import LOG
from megatron_taipan.config import Config
from megatron_taipan.layer_kinds.metrics import LayerMetrics
from megatron_taipan.train.evaluate import Evaluation, mean_evaluation
from megatron_taipan.train.logs import JsonLines, TextLog, open_boards, say
from megatron_taipan.train.peaks import device_name, known_peak
from megatron_taipan.train.schedule import GateStep
from megatron_taipan.train.step import StepResult
from megatron_taipan.train.summary import Summary, duration, unfinished_run

WARNINGS = ("alarm", "warning", "jump", "spike", "skipped")  # events that are logged as warnings


class Metrics:
    """Rank 0 writes everything; the other ranks a text file each.

    Speed is measured per step: it includes waiting for data and leaves the time of validations out. On a GPU a step's
    update may still run when its numbers are known; its time then counts for the next step.

    Raises:
        UserError: a board was asked for whose package is not installed.
    """

    def __init__(
        self, config: Config, start: Progress, *, flops_per_token: float, devices: int, writes: bool, rank: int = 0
    ):
        self.config, self.writes = config, writes
        self.layer_metrics = LayerMetrics(config.model)
        self.flops, self.devices = flops_per_token, devices
        self.peak = config.log.peak_tflops or known_peak(device_name(), config.train.precision)
        self.mfu_unknown = "no GPU" if device_name() is None else "unknown peak"
        self.step, self.end = start.step, min(config.train.stop_at or config.train.steps, config.train.steps)
        self.summary = Summary()
        self.step_seconds: float | None = None  # smoothed, for the time left
        self.stall_s = 0.0  # seconds lost to checkpoints since the last step was recorded
        self.lap = time.perf_counter()
        self.text = TextLog(config, rank)
        self.jsonl: JsonLines | None = None
        self.boards: list[Any] = []
        self.bar: tqdm | None = None
        self.mute = False  # whether the JSONL cannot be written now
        if not writes:
            return
        folder = Path(config.checkpoint.dir)
        killed = unfinished_run(folder / LOG)
        self.jsonl = JsonLines(folder / LOG)
        if killed:
            summary, last = killed
            self.note(
                "killed", f"the start before this one was killed after step {last}: {summary.text()}", **vars(summary)
            )
        self.boards, faults = open_boards(config, start.step)
        for fault in faults:
            self.note("alarm", fault)
        if config.log.progress and sys.stderr.isatty():
            self.bar = tqdm(total=self.end, initial=start.step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Logs the summary, however the run ended, and closes everything."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if error is not None:
            self.text.write(f"ended by {type(error).__name__}", logging.ERROR, exc_info=(kind, error, trace))
        if self.summary.steps:
            self.note("end", self.summary.text(), **vars(self.summary))
        for board in self.boards:
            self._on_board(board, board.close)
        if self.jsonl is not None:
            self.jsonl.close()
        self.text.close()

    def start_clock(self) -> None:
        """A step begins: what happened since the last one (validation, a checkpoint) is not part of its time."""
        self.lap = time.perf_counter()

    def seconds(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self.lap

    def after_step(
        self,
        step: int,
        result: StepResult,
        *,
        lr: float,
        gate: GateStep | None = None,
        tokens: int,
        data_wait_s: float,
        loss_scale: float | None = None,
        epochs: dict[str, float] | None = None,
    ) -> None:
        """Records a finished step.

        Args:
            step: steps taken, this one included.
            gate: the gates' settings, where there are gates.
            tokens: of this step, over all ranks.
            data_wait_s: seconds that this rank waited for its batches.
            loss_scale: after this step, where fp16 has one.
            epochs: how often each data source has been read, by its prefix.
        """
        seconds, self.step = self.seconds(), step
        self.summary.add(result, tokens, seconds)
        self.step_seconds = seconds if self.step_seconds is None else 0.9 * self.step_seconds + 0.1 * seconds
        speed = tokens / seconds
        mfu = 3 * self.flops * speed / (self.peak * 1e12 * self.devices) if self.peak else None
        values = {
            "loss": result.loss, "ce": result.ce, "budget": result.budget, "grad_norm": result.grad_norm,
            "lr": lr, "skipped": int(result.skipped), "step_s": seconds, "tokens": tokens, "tokens_per_s": speed,
            "mfu": mfu, "memory_gb": peak_memory_gb(), "data_wait_s": data_wait_s, "checkpoint_stall_s": self.stall_s,
        }  # fmt: skip
        if loss_scale is not None:
            values["loss_scale"] = loss_scale
        self.stall_s = 0.0
        values |= {f"epochs/{source}": passes for source, passes in (epochs or {}).items()}
        if gate is not None:
            values |= {
                "gate/capacity": gate.capacity, "gate/tau": gate.tau, "gate/budget_lambda": gate.budget_lambda,
                "gate/every_query": int(gate.every_query),
            }  # fmt: skip
        values |= result.layer_metrics
        self._write({"event": "step", "step": step, **values})
        if step % self.config.log.every == 0 or step == self.end:
            self._chart("train/", values, step)
            skipped = "  SKIPPED: not finite" if result.skipped else ""
            self._line(
                f"step {step}/{self.end}  loss {result.ce:.4f}{self._selected(result, gate)}  norm"
                f" {result.grad_norm:.3f}  lr {lr:.2e}  {speed:,.0f} tokens/s  MFU"
                f" {self.mfu_unknown if mfu is None else f'{mfu:.1%}'}  {self._left()} left{skipped}",
                more=f"  this rank: {seconds:.3f} s, data {data_wait_s:.3f} s, {values['memory_gb']:.2f} GB",
            )
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {result.ce:.4f}, {speed:,.0f} tokens/s", refresh=False)
            self.bar.update(step - self.bar.n)

    def after_evaluation(self, step: int, evaluations: dict[str | None, Evaluation], seconds: float) -> None:
        """Records a validation: of one set, named None, or of several by name, each and all together."""
        whole = mean_evaluation(list(evaluations.values()))
        sets = {name: _of_set(evaluation) for name, evaluation in evaluations.items() if name is not None}
        values = {"ce": whole.ce, "perplexity": whole.perplexity, "tokens": whole.tokens, "s": seconds}
        values |= whole.layer_metrics
        by_position = {"positions": _by_position(whole)} if whole.positions else {}
        self._write({"event": "valid", "step": step, **values, **by_position, **({"sets": sets} if sets else {})})
        charted = dict(values)
        for prefix, of_set in (("", by_position), *((f"{name}/", of_set) for name, of_set in sets.items())):
            losses = of_set.get("positions", {})
            charted |= {prefix + key: value for key, value in of_set.items() if key != "positions"}
            charted |= {f"{prefix}position/{key}": value for key, value in losses.items()}
        self._chart("valid/", charted, step)
        of_sets = "".join(f"  {name} {of_set['ce']:.4f}" for name, of_set in sets.items())
        self._line(f"step {step}  validation loss {whole.ce:.4f}  perplexity {whole.perplexity:.2f}{of_sets}")

    def after_save(self, step: int, path: Path, *, stall: float, write: float) -> None:
        """Records a complete checkpoint: seconds that training paused for it, and seconds of rank 0's writing."""
        self.summary.saves += 1
        self.summary.stall_s += stall
        self._write({"event": "save", "step": step, "path": str(path), "stall_s": stall, "write_s": write})
        self._chart("checkpoint/", {"stall_s": stall, "write_s": write}, step)
        self._line(f"step {step}  checkpoint {path}  ({stall:.2f} s of training, {write:.2f} s of writing)")

    def after_task(
        self, step: int, task: str, results: dict[str, Any], curves: dict[str, float], seconds: float
    ) -> None:
        """Records what a task found on the checkpoint of `step`, which may be many steps ago; boards get it there too.

        Args:
            results: the table's rows or the values; curves: those of its numbers that boards draw.
            seconds: that it took.
        """
        self._write({"event": "task", "step": step, "task": task, "s": seconds, **results})
        self._chart(f"tasks/{task}/", curves, step)
        told = "  ".join(f"{name} {value:.6g}" for name, value in list(curves.items())[:4])
        more = f"  and {len(curves) - 4} more" if len(curves) > 4 else ""
        self._line(f"step {step}  task {task}  {told or 'done'}{more}  ({seconds:.0f} s beside the training)")

    def stalled(self, seconds: float) -> None:
        """Adds seconds that training paused for a checkpoint; the next step's record holds the sum."""
        self.stall_s += seconds

    def note(self, event: str, text: str, **values: Any) -> None:
        """Records anything else that a reader of the log should know, and prints it."""
        self._write({"event": event, "step": self.step, "text": text, **values})
        self._line(text, level=logging.WARNING if event in WARNINGS else logging.INFO)

    def _selected(self, result: StepResult, gate: GateStep | None) -> str:
        """What the gates took of what they may, for the line of a step: the mean over the S layers."""
        if gate is None:
            return ""
        shares = self.layer_metrics.of_gates(result.layer_metrics, "selected")
        return f"  selected {sum(shares) / len(shares):.3f} of {gate.capacity:.3f}"

    def _left(self) -> str:
        return duration((self.step_seconds or 0) * max(self.end - self.step, 0))

    def _write(self, record: dict[str, Any]) -> None:
        if self.jsonl is None:
            return
        fault = self.jsonl.write({"time": round(time.time(), 3), **record})
        if fault is not None and not self.mute:
            self._line(
                f"alarm: {LOG} cannot be written ({fault.strerror}); its lines wait until it can", logging.WARNING
            )
        self.mute = fault is not None

    def _chart(self, prefix: str, values: dict[str, Any], step: int) -> None:
        numbers = {prefix + name: value for name, value in values.items() if value is not None}
        for board in list(self.boards):
            self._on_board(board, lambda board=board: board.scalars(numbers, step))

    def _on_board(self, board: Any, action: Any) -> None:
        """Runs `action`; a board that fails is not used again in this run, since its file may be incomplete."""
        try:
            action()
        except Exception as error:  # whatever the library raises, training goes on
            self.boards = [other for other in self.boards if other is not board]
            self._line(f"alarm: {board.name} is off from here on: {type(error).__name__}: {error}", logging.WARNING)

    def _line(self, text: str, level: int = logging.INFO, more: str = "") -> None:
        """Prints a line on rank 0, and writes it to every rank's text file, with `more` about the rank."""
        self.text.write(text + more, level)
        if not self.writes:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            say(text)


def peak_memory_gb() -> float:
    """The most GPU memory that this process has used so far, or without a GPU the most host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9  # recorded graphs are in no count of live tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def _of_set(evaluation: Evaluation) -> dict[str, Any]:
    values: dict[str, Any] = {"ce": evaluation.ce, "perplexity": evaluation.perplexity, "tokens": evaluation.tokens}
    return values | ({"positions": _by_position(evaluation)} if evaluation.positions else {})


def _by_position(evaluation: Evaluation) -> dict[str, float]:
    return {name: loss for name, (loss, _) in evaluation.positions.items()}
