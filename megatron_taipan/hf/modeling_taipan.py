"""The transformers face of Taipan: wraps `megatron_taipan.model.taipan.Taipan`, computes nothing of its own."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatron_taipan.gate_config import at_the_end
from megatron_taipan.hf.arguments import check_arguments
from megatron_taipan.hf.configuration_taipan import TaipanConfig
from megatron_taipan.hf.documents import IGNORED, documents_from_mask, documents_from_positions, within_texts
from megatron_taipan.model.cache import Cache as TaipanState
from megatron_taipan.model.init import initial_value
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.layout import describe

# What generate() calls the cache, among the arguments and in the output: "past_key_values" before 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class TaipanCache(Cache):
    """What `generate()` passes from step to step: our cache, made by the model on first use.

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
        prompt again into a cache that is passed on. Ours counts tokens whatever its layers are, so none is."""
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


class TaipanForCausalLM(PreTrainedModel, GenerationMixin):
    """A Taipan language model for transformers."""

    config_class = TaipanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True  # no assisted decoding: states cannot be rolled back
    _no_split_modules = ["MambaBlock", "AttentionBlock", "SelectiveAttentionBlock"]

    def __init__(self, config: TaipanConfig):
        super().__init__(config)
        self.model = Taipan(config.model_config())
        self.gradient_checkpointing = False
        self._train_step = 0  # draws fresh gate noise in every training step
        self._keep_in_fp32_modules_strict = float32_names(self.model)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TaipanCache | None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: TaipanCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: [b, l].
            attention_mask: [b, past + l], 0 on padding, which must stand at the left or the right end of a row.
            past_key_values, cache: earlier tokens, extended in place; two names of one argument.
            labels: [b, l], not shifted; -100 is left out of the loss.
            seq_idx: [b, l] document of each token where rows are packed; instead of attention_mask.
            logits_to_keep: logits of the last so many positions only, or of positions [n]; 0 keeps all.
            kwargs: position_ids [b or 1, l], which pack a row where they start again, as seq_idx does;
                num_items_in_batch, labels in the whole accumulated batch; and what `arguments.py` ignores.

        Returns:
            In training mode with labels: the trainer's loss (cross entropy plus budget) and no logits, which are then
            never held in memory. Otherwise logits [b, l or logits_to_keep, v] in float32 and, with labels, the mean
            cross entropy.

        Raises:
            ValueError: no tokens; a mask, positions or a cache that do not fit them; what Taipan does not support.
            TypeError: an unknown argument.
        """
        check_arguments(self.forward, kwargs)
        if input_ids is None or input_ids.dim() != 2 or 0 in input_ids.shape:
            shape = "None" if input_ids is None else list(input_ids.shape)
            raise ValueError(f"input_ids is {shape}, but must be [batch, length] of at least one token")
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and labels is None:
            cache = TaipanCache()
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if seq_idx is None:
            seq_idx = documents_of(input_ids, attention_mask, kwargs, cache)
        items = kwargs.get("num_items_in_batch")
        if labels is not None and self.training:
            loss = self._training_loss(input_ids, labels, attention_mask, seq_idx, items)
            return CausalLMOutputWithPast(loss=loss) if return_dict else (loss,)

        state = self._state_of(cache, input_ids.shape[0]) if cache is not None else None
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
        logits = self.model(input_ids, seq_idx=seq_idx, cache=state, all_logits=not last_only).logits
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep > 1:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            labels = within_texts(labels, attention_mask, seq_idx)
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, num_items_in_batch=items)
        kept: dict[str, Any] = {CACHE: cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **kept)
        return output if return_dict else output.to_tuple()

    def _training_loss(
        self, input_ids: Tensor, labels: Tensor, mask: Tensor | None, seq_idx: Tensor | None, n_items: Any
    ) -> Tensor:
        """The trainer's loss. `n_items`: labels in the whole accumulated batch (what transformers' Trainer passes)."""
        following = torch.full_like(labels, IGNORED)
        following[:, :-1] = within_texts(labels, mask, seq_idx)[:, 1:]
        counted = following != IGNORED
        self._train_step += 1
        output = self.model(
            input_ids,
            labels=following.masked_fill(~counted, 0),
            loss_mask=counted.float(),
            seq_idx=seq_idx,
            step=self._train_step,
            ce_scale=None if n_items is None else 1.0 / n_items,
        )
        if n_items is None:
            return output.loss
        # The Trainer adds up the losses of accumulated batches: each brings its share of the mean budget loss.
        return (
            output.ce_loss
            + at_the_end(self.model.config.gate.budget_lambda) * output.budget_loss * counted.sum() / n_items
        )

    def _state_of(self, cache: TaipanCache, batch: int) -> TaipanState:
        """The memory inside `cache`, made on first use.

        Raises:
            ValueError: a cache of another model's kind, or of another number of rows.
        """
        if not isinstance(cache, TaipanCache):
            raise ValueError(f"the cache must be a TaipanCache or None, not a {type(cache).__name__}")
        if cache.state is None:
            cache.state = self.model.new_cache(batch, self.device, self.dtype)
        rows = len(cache.state.layers[0].tensors()[0])
        if rows != batch:
            raise ValueError(f"the cache holds {rows} rows, but input_ids has {batch}; they must be the same texts")
        return cache.state

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict:
        """What a step of `generate()` passes to forward. generate() asks whether an argument is called `kwargs`.

        Raises:
            ValueError: a cache is passed on with no token that is new to it. Left with none to pass, transformers
                would take all tokens again.
        """
        new = kwargs.get("next_sequence_length")
        if new is not None and new < 1:
            raise ValueError(
                f"the cache holds {input_ids.shape[1] - new} tokens a row and generate() was given"
                f" {input_ids.shape[1]}: pass the whole text, cached tokens included, with at least one more"
            )
        parent: Any = super()
        return parent.prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kw: Any) -> None:
        """`generate()` asks here for a cache; no general class of transformers fits a selective attention layer."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not apply: Taipan has a cache of"
                " its own, of constant size"
            )
        given = [model_kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        cache = given[0] if given[1] is None else given[1]
        if cache is not None:
            cache._is_user_defined = True  # asked by generate() before it computes a step too many (5.24, mps)
        elif generation_config.use_cache is not False:
            cache = TaipanCache()
        if cache is not None:
            model_kwargs[CACHE] = cache

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Gives a parameter that no file held its initial value from our table (`model/init.py`)."""
        table = describe(self.model.config)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter in module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                name = names[id(parameter)]
                parameter.copy_(initial_value(name, table[name], self.model.config, 0))
        for buffer in module.buffers(recurse=False):  # the gate's threshold
            if not getattr(buffer, "_is_hf_initialized", False):
                buffer.fill_(self.model.config.gate.threshold)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """transformers' switch; the layers are recomputed by the model itself."""
        self.gradient_checkpointing = enable
        self.model.recompute = "full" if enable else "none"

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> None:
        return None  # the head is no separate Linear layer

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        raise NotImplementedError("Taipan's vocabulary is fixed at training; train with a larger model.vocab_size")


def float32_names(model: Taipan) -> list[str]:
    """Names, as this class's state_dict has them, of what stays float32 in a bf16 or fp16 model."""
    islands = [name for name, spec in describe(model.config).items() if spec.float32]
    return [f"model.{name}" for name in (*islands, *dict(model.named_buffers()))]


def documents_of(
    tokens: Tensor, mask: Tensor | None, kwargs: dict[str, Any], cache: TaipanCache | None
) -> Tensor | None:
    """Documents [b, l] of tokens [b, l], from the mask or from positions that start again; None: one a row.

    Raises:
        ValueError: a mask or positions that do not fit; document borders for FlashAttention without either.
    """
    rows, length = tokens.shape
    past = cache.get_seq_length() if cache is not None else 0
    positions = kwargs.get("position_ids")
    if positions is None and kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("cu_seq_lens_q packs rows without saying which token is whose: pass position_ids or seq_idx")
    documents = documents_from_mask(mask, rows, length, past) if mask is not None else None
    packed = None
    if positions is not None:
        packed = documents_from_positions(positions, mask, length, cache is not None)
    return documents if packed is None else packed.expand(rows, -1)
