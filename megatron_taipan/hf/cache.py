"""The cache that generate() passes from step to step."""

from dataclasses import fields

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatron_taipan.model.cache import Cache as TaipanState

# What generate() calls the cache, among the arguments and in the output: "past_key_values" before 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class TaipanCache(Cache):
    """What `generate()` passes from step to step: Taipan's cache, made by the model on first use.

    Its memory does not grow with the text, except in full attention (`A`) layers.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: TaipanState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens consumed so far, padding included."""
        return self.state.length if self.state is not None else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # unlimited

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None and self.state.document_start is not None:
            rows = torch.arange(len(self.state.document_start), device=self.state.document_start.device)
            self.state.select(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a recurrent state cannot be rolled back: Taipan's cache cannot be cropped")

    @property
    def is_linear(self) -> list[bool]:
        """Of transformers' own linear layers, which count no tokens: where all layers are, generate() reads a whole
        prompt again into a cache that is passed on. This one counts tokens whatever its layers are, so none is."""
        return [False]

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None
