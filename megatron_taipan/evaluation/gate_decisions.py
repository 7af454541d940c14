"""Which tokens of a text each gate of a network selects."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_taipan.errors import UserError
from megatron_taipan.inference.generation import prefill
from megatron_taipan.inference.selection_watch import gated_blocks
from megatron_taipan.model.taipan import Taipan


class GateDecisions(NamedTuple):
    """What s gates decide for a document of l tokens."""

    layers: list[int]  # [s] indices of their layers in the pattern, counted from 0
    selected: Tensor  # [s, l] bool
    alpha: Tensor  # [s, l] weight that the attention's output takes where the token is selected


@torch.inference_mode()
def collect_decisions(model: Taipan, ids: list[int], chunk: int = 2048) -> GateDecisions:
    """Reads one document in evaluation mode and records what the gates decide; the result is on the CPU.

    Args:
        chunk: tokens per pass; bounds the memory, changes nothing else.

    Raises:
        UserError: the model has no S layer, no tokens are given, or an id is outside the vocabulary.
    """
    blocks = gated_blocks(model)
    size = model.config.vocab_size
    if not blocks:
        raise UserError(
            f"pattern {model.config.pattern!r} has no S layer, so no gate selects tokens; name another model"
        )
    if not ids:
        raise UserError("the text has 0 tokens; give a text that the tokenizer does not drop")
    if max(ids) >= size:
        raise UserError(
            f"the tokenizer gives id {max(ids)}, and the model has {size} ids; pass the data's own with --tokenizer"
        )
    noted: list[list[tuple[Tensor, Tensor]]] = [[] for _ in blocks]  # for each gate and chunk, selected and alpha
    hooks = [
        block.gate.register_forward_hook(
            lambda _, __, selection, into=into: into.append(
                (selection.selected.flatten().cpu(), selection.alpha.flatten().cpu())
            )
        )
        for block, into in zip(blocks, noted, strict=True)
    ]
    tokens = torch.tensor([ids], device=next(model.parameters()).device)  # [1, l]
    document = torch.zeros_like(tokens, dtype=torch.int32)
    was_training = model.training
    model.eval()
    try:
        prefill(model, tokens, document, model.new_cache(1), chunk)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    selected, alpha = (torch.stack([torch.cat([part[i] for part in parts]) for parts in noted]) for i in (0, 1))
    return GateDecisions([block.layer for block in blocks], selected, alpha)
