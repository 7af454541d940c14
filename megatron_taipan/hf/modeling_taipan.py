"""The transformers classes of Taipan with a head: they compute only logits and losses themselves."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatron_taipan.gate_config import at_the_end
from megatron_taipan.hf.arguments import check_arguments
from megatron_taipan.hf.cache import CACHE, TaipanCache
from megatron_taipan.hf.configuration_taipan import TaipanConfig
from megatron_taipan.hf.documents import IGNORED, within_texts
from megatron_taipan.hf.network import TaipanModel, TaipanPreTrainedModel, beside, check_tokens, documents_of, one_cache
from megatron_taipan.model.stack import training_loss
from megatron_taipan.ops.numerics import at_least_float32

__all__ = ["TaipanCache", "TaipanForCausalLM", "TaipanForSequenceClassification", "TaipanModel"]


class TaipanForCausalLM(TaipanPreTrainedModel, GenerationMixin):
    """A Taipan language model for transformers."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # where the configuration says so

    def __init__(self, config: TaipanConfig):
        super().__init__(config)
        self.model = TaipanModel(config)
        network = config.model_config()
        self.lm_head = nn.Linear(network.d_model, network.vocab_size, bias=False)
        self._keep_in_fp32_modules_strict = self._float32_names("model.")
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TaipanCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: TaipanCache | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: [b, l]; or inputs_embeds: [b, l, d] in its place.
            attention_mask: [b, past + l], 0 on padding, which must be at the left or the right end of a row.
            past_key_values, cache: earlier tokens, extended in place; two names of one argument.
            labels: [b, l], not shifted; -100 is left out of the loss.
            seq_idx: [b, l] document of each token where rows are packed, a run of one number each; instead of
                attention_mask.
            logits_to_keep: logits of the last so many positions only, or of positions [n]; 0 keeps all.
            output_hidden_states: give the residual stream between the layers too, see `TaipanModel.forward`.
            skip_logits: with labels in training mode, give no logits. They are 4 b l v bytes, and their gradient as
                much again; skipped, the head and the loss are computed in chunks of 128 MiB. None: as config.json says
                (`skip_logits`), else False.
            kwargs: position_ids [b or 1, l], which pack a row where they start again, as seq_idx does;
                num_items_in_batch, labels in the whole accumulated batch; and what `arguments.py` ignores.

        Returns:
            logits [b, l or logits_to_keep, v] in float32. With labels a loss: the mean cross entropy and, in training
            mode, the budget of the gates, as the trainer has it.

        Raises:
            ValueError: no tokens; a mask, positions or a cache that do not fit them; what Taipan does not support.
            TypeError: an unknown argument.
        """
        check_arguments(self.forward, kwargs)
        check_tokens(input_ids, inputs_embeds)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None  # by check_tokens
        cache = one_cache(cache, past_key_values)
        if cache is None and use_cache and labels is None:
            cache = TaipanCache()
        if seq_idx is None:
            seq_idx = documents_of(tokens.shape[:2], attention_mask, kwargs, cache)
        output = self.model(
            input_ids, inputs_embeds=inputs_embeds, seq_idx=seq_idx, output_hidden_states=output_hidden_states,
            cache=cache, return_dict=True,
        )  # fmt: skip
        h = beside(self.lm_head, output.last_hidden_state)
        skip_logits = self.config.skip_logits if skip_logits is None else skip_logits
        logits = loss = None
        if labels is None or not (self.training and skip_logits):
            logits = at_least_float32(self.lm_head(keep_positions(h, logits_to_keep) if labels is None else h))
        if labels is not None:
            following = torch.full_like(labels, IGNORED)  # [b, l] what each position should predict
            following[:, :-1] = within_texts(labels, attention_mask, seq_idx)[:, 1:]
            loss = self._loss(h, logits, following, output.budget_loss, kwargs.get("num_items_in_batch"))
            logits = None if logits is None else keep_positions(logits, logits_to_keep)
        kept: dict[str, Any] = {CACHE: cache, "hidden_states": output.hidden_states}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **kept)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _loss(self, h: Tensor, logits: Tensor | None, following: Tensor, budget: Tensor, n_items: Any) -> Tensor:
        """The mean cross entropy, and in training mode the budget loss.

        Args:
            h: [b, l, d]; logits: [b, l, v], or None; following: [b, l] the token after each, IGNORED where none
                counts.
            n_items: labels in the whole accumulated batch (what transformers' Trainer passes), whose losses it adds up:
                each then brings its share of the means.

        Returns:
            the loss, where the logits are; its inputs may be elsewhere (accelerate's device_map).
        """
        device = (h if logits is None else logits).device
        following, budget = following.to(device), budget.to(device)
        n_items = n_items.to(device) if isinstance(n_items, Tensor) else n_items
        counted = following != IGNORED
        count = counted.sum().clamp(min=1) if n_items is None else n_items
        if logits is None:
            weights = counted.float() / count
            cross_entropy = self.model.ops.linear_cross_entropy(
                h.flatten(0, 1), self.lm_head.weight, following.clamp(min=0).flatten(), weights.flatten()
            )
        else:
            sums = F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="sum")
            cross_entropy = sums / count
        if not self.training:
            return cross_entropy
        share = None if n_items is None else counted.sum() / n_items
        return training_loss(cross_entropy, budget, at_the_end(self.model.gate_config.budget_lambda), share)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """transformers 5.3 forgets here that files of a model from a folder's code hold no tied head, and ties none."""
        missing = set(loading_info.missing_keys)
        parent: Any = super()
        parent.mark_tied_weights_as_initialized(loading_info)
        loading_info.missing_keys |= missing & self.all_tied_weights_keys.keys()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict:
        """What a step of `generate()` passes to forward. generate() asks whether arguments have these names.

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
        return parent.prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kw: Any) -> None:
        """`generate()` asks here for a cache; no general class of transformers fits a selective attention layer."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not apply: Taipan has its own"
                " cache, of constant size"
            )
        given = [model_kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        cache = given[0] if given[1] is None else given[1]
        if cache is not None:
            cache._is_user_defined = True  # asked by generate() before it computes a step too many (5.24, mps)
        elif generation_config.use_cache is not False:
            cache = TaipanCache()
        if cache is not None:
            model_kwargs[CACHE] = cache


class TaipanForSequenceClassification(GenericForSequenceClassification, TaipanPreTrainedModel):
    """A linear classifier of the last token that is not padding; transformers' own forward pass and losses."""

    def __init__(self, config: TaipanConfig):
        TaipanPreTrainedModel.__init__(self, config)  # the general class asks AutoModel, which may not know Taipan
        self.num_labels = config.num_labels
        self.model = TaipanModel(config)
        assert config.num_labels is not None
        self.score = nn.Linear(config.model_config().d_model, config.num_labels, bias=False)
        self._keep_in_fp32_modules_strict = self._float32_names("model.")
        self.post_init()


def keep_positions(x: Tensor, positions: int | Tensor) -> Tensor:
    """x [b, l, e] at the last so many positions (0: all), or at those of [n]."""
    return x[:, positions.to(x.device)] if isinstance(positions, Tensor) else x[:, -positions:]
