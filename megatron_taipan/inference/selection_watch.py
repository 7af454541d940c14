"""How many tokens the gates select while a program evaluates or generates, and a warning where it is far from training.

A gate that was trained to select C of the tokens decides by Gumbel noise in training and by a threshold afterwards.
Where it is still undecided the two can differ by any factor: a model is then used with its attention practically off.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from megatron_taipan.model.blocks import SelectiveAttentionBlock
from megatron_taipan.model.gate import Selection
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig

FEWEST = 200  # tokens; the share of fewer says little
FACTOR = 4.0  # between the share found and the one trained for
CALIBRATE = "python -m megatron_taipan.evaluation calibrate CHECKPOINT sets thresholds by which it is"


def gated_blocks(model: Taipan) -> list[SelectiveAttentionBlock]:
    """The layers of a network that have a gate, from the first on."""
    return [layer for layer in model.layers if isinstance(layer, SelectiveAttentionBlock)]


class SelectionWatch:
    """Counts, on the device, what each gate of a network selects from now on. Replayed CUDA graphs are not seen.

    Where ranks hold pieces of the rows, each counts its own."""

    def __init__(self, model: Taipan):
        self.place = model.place
        blocks = gated_blocks(model)
        self.seen: dict[str, list[Tensor]] = {f"layers.{block.layer}": [] for block in blocks}  # [2] selected, tokens
        self.hooks = [
            block.gate.register_forward_hook(partial(_count, kept))
            for block, kept in zip(blocks, self.seen.values(), strict=True)
        ]

    def shares(self) -> dict[str, float]:
        """Layer to the share of its tokens that it selected, of all pieces (collective); empty where fewer than FEWEST
        were seen."""
        whole = self.place.sum_pieces if self.place else Tensor.clone
        counts = {layer: whole(kept[0]).tolist() for layer, kept in self.seen.items() if kept}
        return {layer: selected / tokens for layer, (selected, tokens) in counts.items() if tokens >= FEWEST}

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _count(kept: list[Tensor], _: nn.Module, __: tuple, selection: Selection) -> None:
    """Adds a pass of a gate to what is kept of it."""
    selected = selection.selected  # [b, l] bool
    counts = torch.stack([selected.sum(), selected.new_tensor(selected.numel(), dtype=torch.int64)])
    kept[:] = [kept[0] + counts if kept else counts]


def far_from_training(config: ModelConfig, shares: dict[str, float]) -> str | None:
    """A sentence on the layers that select less than a quarter, or more than four times, of what they were trained for;
    None where none does. With budget=layers the layers share one budget, so their mean counts."""
    wanted = config.gate.final_capacity
    if config.gate.noise == "random" or not shares or wanted == 0:
        return None
    if config.gate.budget == "layers":
        shares = {"the layers' mean": sum(shares.values()) / len(shares)}
    far = {layer: s for layer, s in shares.items() if s < wanted / FACTOR or s > min(wanted * FACTOR, 1.0)}
    if not far:
        return None
    found = ", ".join(f"{layer} selects {share:.2%}" for layer, share in far.items())
    return f"{found} of the tokens, where training asked for {wanted:.0%}; {CALIBRATE}"


@contextmanager
def watched_selection(model: Taipan, name: str) -> Iterator[SelectionWatch]:
    """Warns on stderr at the end, once for all ranks, if what ran inside selected a share far from the one trained
    for."""
    watch = SelectionWatch(model)
    try:
        yield watch
    finally:
        watch.stop()
    sentence = far_from_training(model.config, watch.shares())
    if sentence and (model.place is None or model.place.rank == 0):
        print(f"warning: {name}: {sentence}", file=sys.stderr, flush=True)
