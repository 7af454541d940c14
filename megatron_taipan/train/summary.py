"""A run in a few numbers, logged at its end; that of a killed run is computed at the next start."""

from dataclasses import dataclass
from pathlib import Path

from megatron_taipan.checkpoint.run_log import records_backwards
from megatron_taipan.train.step import StepResult


@dataclass
class Summary:
    """What one start of the program did."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of the steps; validations and checkpoints not counted
    first_loss: float | None = None
    last_loss: float | None = None
    skipped: int = 0
    saves: int = 0
    stall_s: float = 0.0  # training paused for checkpoints

    def add(self, result: StepResult, tokens: int, seconds: float) -> None:
        self.count(result.ce, bool(result.skipped), tokens, seconds)

    def count(self, ce: float | None, skipped: bool, tokens: int, seconds: float) -> None:
        """One more step."""
        self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + seconds
        self.skipped += skipped
        if not skipped:
            self.first_loss = ce if self.first_loss is None else self.first_loss
            self.last_loss = ce

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


def unfinished_run(log: Path) -> tuple[Summary, int] | None:
    """What the start before did, and the last step it logged, if it was killed before it could log this itself.

    Read from the end of the JSONL back to the last `start`.
    """
    found = []
    for record in records_backwards(log):
        if record.get("event") in ("end", "killed"):
            return None
        found.append(record)
        if record.get("event") == "start":
            break
    summary, step = Summary(), 0
    for record in reversed(found):
        if record.get("event") == "step":
            summary.count(record.get("ce"), bool(record["skipped"]), record["tokens"], record["step_s"])
            step = record["step"]
        elif record.get("event") == "save":
            summary.saves, summary.stall_s = summary.saves + 1, summary.stall_s + record.get("stall_s", 0.0)
    return (summary, step) if summary.steps else None
