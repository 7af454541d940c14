"""Thresholds that make a trained model select the fraction C of held-out text.

In training P(m = 1) = alpha, so the budget pins the mean of alpha to C. In evaluation a token is selected where
s_1 - s_0 exceeds a threshold, and with threshold 0 (alpha > 1/2) the fraction is another one unless the gates
saturate. The threshold of each layer is set to the (1 - C) quantile of s_1 - s_0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_taipan.errors import UserError
from megatron_taipan.model.blocks import SelectiveAttentionBlock
from megatron_taipan.model.taipan import Taipan

MAX_MARGINS = 10_000_000  # values kept for a quantile; 40 MB


@torch.no_grad()
def calibrate(model: Taipan, batches: Sequence[dict[str, Tensor]], capacity: float | None = None) -> list[float]:
    """Sets `gate.threshold` of every S layer and returns the thresholds, in the order of the layers.

    Layer by layer from below, because what a layer selects changes what the layers above it see: one pass over the
    batches for each S layer.

    Args:
        batches: held-out micro-batches as the loader gives them (tokens [b, l], seq_idx [b, l]), on the model's device.
        capacity: wanted fraction; None: the configuration's C.

    Raises:
        UserError: no batches, the model has no S layer, or the capacity is no fraction.
    """
    wanted = model.config.gate.capacity if capacity is None else capacity
    gates = [layer.gate for layer in model.layers if isinstance(layer, SelectiveAttentionBlock)]
    if not gates or not batches:
        what = (
            "no batches to calibrate on" if gates else f"pattern {model.config.pattern!r} has no S layer to calibrate"
        )
        raise UserError(f"calibrate: {what}")
    if not 0 <= wanted <= 1:
        raise UserError(f"calibrate: capacity={wanted} is no fraction between 0 and 1")
    was_training = model.training
    model.eval()
    for gate in gates:
        margins: list[Tensor] = []
        hook = gate.register_forward_hook(
            lambda _, __, selection, into=margins: into.append(selection.margin.flatten())
        )
        for batch in batches:
            model(batch["tokens"], seq_idx=batch["seq_idx"], all_logits=False)
        hook.remove()
        gate.threshold.copy_(_quantile(torch.cat(margins).float(), wanted))
    model.train(was_training)
    return [gate.threshold.item() for gate in gates]


def _quantile(margins: Tensor, fraction: float) -> Tensor:
    """A value that `fraction` of the margins exceed, halfway between the neighbours."""
    if margins.numel() > MAX_MARGINS:
        margins = margins[:: -(-margins.numel() // MAX_MARGINS)]
    ordered = margins.sort(descending=True).values
    above = round(fraction * len(ordered))
    if above == 0:
        return ordered[0] + 1
    if above == len(ordered):
        return ordered[-1] - 1
    return (ordered[above - 1] + ordered[above]) / 2
