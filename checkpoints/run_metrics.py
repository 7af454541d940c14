"""What a run's log says about a checkpoint: its last validation, for the model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taipan.layer_kinds.metrics import logged
from megatron_taipan.untrusted import parse_json

LOG = "log.jsonl"  # in the run's folder, beside its checkpoints (megatron_taipan/train/logs.py)


@dataclass(frozen=True)
class Validation:
    """A validation of the weights, or of the same run some steps before."""

    step: int
    loss: float  # mean cross entropy of a token, nats
    perplexity: float
    tokens: int  # held-out ones that the mean is taken over
    shares: dict[str, float]  # of them that each gate selects, by layer; none where there are no gates

    @property
    def selected(self) -> float | None:
        """The mean over the layers; None where there are none."""
        return sum(self.shares.values()) / len(self.shares) if self.shares else None


def last_validation(checkpoint: Path, step: int) -> Validation | None:
    """The newest validation up to `step` in the log of the checkpoint's run; None where there is none.

    Of several of one step, which a resumed run may have written, the last one counts.
    """
    found: dict[str, Any] | None = None
    try:
        lines = (checkpoint.parent / LOG).open("rb")
    except OSError:
        return None
    with lines:
        for line in lines:
            if b'"valid"' not in line:  # a log holds a line for each step
                continue
            record = _record(line)
            if record and record["step"] <= step and (found is None or record["step"] >= found["step"]):
                found = record
    if found is None:
        return None
    shares = logged(found, "selected")
    finite = all(isinstance(share, int | float) for share in shares.values())
    return Validation(found["step"], found["ce"], found["perplexity"], found["tokens"], shares if finite else {})


def _record(line: bytes) -> dict[str, Any] | None:
    """A validation's record; None for another line, one cut in two, or numbers that were not finite."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("event") != "valid":
        return None
    wanted = ("step", "ce", "perplexity", "tokens")
    return record if all(isinstance(record.get(name), int | float) for name in wanted) else None
