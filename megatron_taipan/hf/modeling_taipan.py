"""The transformers face of Taipan: wraps `megatron_taipan.model.taipan.Taipan`, computes nothing of its own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatron_taipan.gate_config import at_the_end
from megatron_taipan.hf.configuration_taipan import TaipanConfig
from megatron_taipan.model.cache import Cache as TaipanState
from megatron_taipan.model.init import initial_value
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.layout import describe

IGNORED = -100  # label that transformers leaves out of the loss


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
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: [b, l].
            attention_mask: [b, past + l], 0 on padding, which must stand at the left or the right end of a row.
            labels: [b, l], not shifted; -100 is left out of the loss.
            seq_idx: [b, l] document of each token where rows are packed; instead of attention_mask.
            logits_to_keep: logits of the last so many positions only; 0 keeps all.

        Returns:
            In training mode with labels: the trainer's loss (cross entropy plus budget) and no logits, which are then
            never held in memory. Otherwise logits [b, l or logits_to_keep, v] in float32 and, with labels, the mean
            cross entropy.

        Raises:
            ValueError: no input_ids, or a mask that is neither left nor right padding.
        """
        if input_ids is None:
            raise ValueError("TaipanForCausalLM works on input_ids; inputs_embeds are not supported")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if seq_idx is None:
            seq_idx = documents_from_mask(attention_mask, input_ids.shape[1])
        if labels is not None and self.training:
            loss = self._training_loss(input_ids, labels, attention_mask, seq_idx, kwargs.get("num_items_in_batch"))
            return CausalLMOutputWithPast(loss=loss) if return_dict else (loss,)

        if past_key_values is None and use_cache and labels is None:
            past_key_values = TaipanCache()
        state = self._state_of(past_key_values, input_ids.shape[0]) if past_key_values is not None else None
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
        logits = self.model(input_ids, seq_idx=seq_idx, cache=state, all_logits=not last_only).logits
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep > 1:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            labels = within_texts(labels, attention_mask, seq_idx)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
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
            ValueError: a cache of another model's kind.
        """
        if not isinstance(cache, TaipanCache):
            raise ValueError(f"past_key_values must be a TaipanCache or None, not a {type(cache).__name__}")
        if cache.state is None:
            cache.state = self.model.new_cache(batch, self.device, self.dtype)
        return cache.state

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kw: Any) -> None:
        """`generate()` asks here for a cache; no general class of transformers fits a selective attention layer."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not apply: Taipan has a cache of"
                " its own, of constant size"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = TaipanCache()

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


def within_texts(labels: Tensor, mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """The labels [b, l], not shifted, without padding and without first tokens of documents, which are not predicted
    from the document before."""
    if mask is not None:
        labels = labels.masked_fill(mask[:, -labels.shape[1] :] == 0, IGNORED)
    if seq_idx is not None:
        labels = labels.masked_fill(F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)), IGNORED)
    return labels


def documents_from_mask(mask: Tensor | None, length: int) -> Tensor | None:
    """Documents [b, l] int32 of the last `length` tokens: padding and text are documents of their own.

    Raises:
        ValueError: a mask of other than two dimensions, or with padding between tokens of a row.
    """
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"attention_mask must be [batch, length] of 0 and 1, not {mask.dim()}-dimensional")
    changes = (mask[:, 1:] != 0) != (mask[:, :-1] != 0)  # [b, past + l - 1]
    documents = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
    documents[:, 1:] = changes.cumsum(1, dtype=torch.int32)
    if mask.shape[1] > 2 and bool(((documents > 1) & (mask != 0)).any()):
        raise ValueError("attention_mask: padding must stand at the left or the right end of a row, not inside it")
    return documents[:, -length:]
