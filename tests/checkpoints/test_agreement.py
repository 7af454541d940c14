"""How far another library's logits may be from ours: as far as float32 explains, and never further than 1e-3."""

import pytest
import torch

from checkpoints.export_hf import LENGTH, ROWS, TOLERANCE
from checkpoints.foreign import agreement
from checkpoints.foreign.agreement import Answer, compare_logits
from megatron_taipan.errors import UserError
from tests.inference.networks import VOCABULARY, small_config


@pytest.mark.parametrize(
    ("rounding", "accepted", "refused"),
    [(0.0, 0.9 * TOLERANCE, 1.1 * TOLERANCE), (1e-4, 3.9e-4, 4.1e-4), (0.1, 0.9e-3, 1.1e-3), (float("nan"), 0.0, 1e-2)],
)
def test_limits(monkeypatch, rounding, accepted, refused):
    exact = torch.ones(ROWS, LENGTH, VOCABULARY, dtype=torch.float64)
    kinds = {torch.float64: exact, torch.float32: exact * (1 + rounding)}
    monkeypatch.setattr(agreement, "our_logits", lambda network, load, tokens, dtype: kinds[dtype])

    def compared(away):
        answer = Answer("theirs", exact * (1 + away))
        return compare_logits(small_config("M"), VOCABULARY, lambda tokens: answer, load=lambda name: torch.zeros(1))

    assert "logits agree with those of theirs" in compared(accepted)
    for away in (refused, float("nan")):
        with pytest.raises(UserError, match="logits differ from those of theirs"):
            compared(away)
