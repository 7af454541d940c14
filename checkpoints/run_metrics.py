"""What a run's log says about a checkpoint: its last validation, for the model card."""

from dataclasses import dataclass
from pathlib import Path

from megatron_taipan.checkpoint.run_log import LOG, Record, read_records
from megatron_taipan.layer_kinds.metrics import logged


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
    found: Record | None = None
    try:
        for record in read_records(checkpoint.parent / LOG, "valid"):
            whole = all(isinstance(record.get(name), int | float) for name in ("step", "ce", "perplexity", "tokens"))
            if whole and record["step"] <= step and (found is None or record["step"] >= found["step"]):
                found = record  # numbers that were not finite are null
    except OSError:
        return None
    if found is None:
        return None
    shares = logged(found, "selected")
    finite = all(isinstance(share, int | float) for share in shares.values())
    return Validation(found["step"], found["ce"], found["perplexity"], found["tokens"], shares if finite else {})
