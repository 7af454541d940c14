"""The values of attention against finite differences, and masks against a model without the layer."""

import pytest
import torch

from experiments.attention_value import Masked, fit, keep_largest, measure_value
from tests.model.small import close, small_model, tokens

B, L = 2, 11


def rows() -> dict[str, torch.Tensor]:
    ids = tokens(B, L + 1)
    return {
        "tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": torch.ones(B, L),
        "seq_idx": torch.zeros(B, L, dtype=torch.int32),
    }  # fmt: skip


def ones(layers: int) -> list[torch.Tensor]:
    return list(torch.ones(layers, B, L))


def test_masks_of_ones_change_nothing_and_of_zeros_are_a_layer_without_output():
    model, plain, silent = small_model("WMW"), small_model("WMW"), small_model("WMW")
    with torch.no_grad():
        silent.layers[2].attention.out_proj.zero_()
    batch, masked = rows(), Masked(model)
    scored = {"labels": batch["labels"], "ce_scale": 1.0}
    close(masked.loss(batch, ones(2)), plain(batch["tokens"], **scored).ce_loss, 1e-12)
    close(masked.loss(batch, [torch.ones(B, L), torch.zeros(B, L)]), silent(batch["tokens"], **scored).ce_loss, 1e-12)


def test_a_value_is_minus_the_slope_of_the_loss():
    masked, batch = Masked(small_model("WMW")), rows()
    drawn = torch.Generator().manual_seed(3)
    values, read = masked.values(batch, torch.Generator().manual_seed(3))
    expected, token = 0.0, 4
    for _ in range(3):
        masks = [m.double() for m in torch.rand(2, B, L, generator=drawn) < 0.5]
        losses = []
        for step in (1e-5, -1e-5):
            moved = [m.clone() for m in masks]
            moved[1][0, token] += step
            losses.append(masked.loss(batch, moved).item())
        expected -= (losses[0] - losses[1]) / 2e-5 / 3
    assert values[1, token].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert read.shape[:2] == (2, B * L)


def test_the_share_kept_is_that_asked_for_over_layers_and_batches():
    ranking = [torch.tensor([[5.0, 1.0, 4.0], [0.0, 3.0, 2.0]]), torch.tensor([[9.0], [-1.0]])]
    kept = keep_largest(ranking, 0.5)
    assert [k.tolist() for k in kept] == [[[True, False, True], [False, True, False]], [[True], [False]]]
    assert not any(k.any() for k in keep_largest(ranking, 0.0)) and all(k.all() for k in keep_largest(ranking, 1.0))


def test_everything_kept_is_the_models_own_loss_and_a_fitted_gate_ranks_what_it_has_seen():
    masked, batch = Masked(small_model("WMW")), rows()
    found = measure_value(masked, [batch], [batch], torch.Generator().manual_seed(0))
    assert found["all"][1:] == [1, 1] and found["none"][1:] == [0, 0] and found["layer 1 alone"][1:] == [0, 1]
    assert found["all"][0] == pytest.approx(masked.loss(batch, ones(2)).item() / (B * L), abs=1e-4)
    worth, read = masked.values(batch, torch.Generator().manual_seed(0))
    gates = fit(masked, [batch], torch.Generator().manual_seed(0))  # 22 tokens, 25 numbers: it can fit them all
    told = (read.double() @ gates[:, :-1, None])[..., 0] + gates[:, -1:]
    assert torch.corrcoef(torch.stack([told[0], worth[0].double()]))[0, 1] > 0.9
