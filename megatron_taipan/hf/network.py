"""The network between tokens and logits as transformers has it, and what all transformers classes of Taipan share."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from megatron_taipan.hf.arguments import check_arguments
from megatron_taipan.hf.cache import CACHE, TaipanCache
from megatron_taipan.hf.configuration_taipan import TaipanConfig
from megatron_taipan.hf.documents import documents_from_mask, documents_from_positions, numbered_by_run
from megatron_taipan.hf.linears import hold_in_linears, register_names, table_name
from megatron_taipan.model.blocks import BLOCKS, make_layers
from megatron_taipan.model.build import Build
from megatron_taipan.model.cache import Cache as TaipanState
from megatron_taipan.model.cache import new_cache
from megatron_taipan.model.context import Context, make_context
from megatron_taipan.model.gate_settings import settled
from megatron_taipan.model.init import initial_value
from megatron_taipan.model.layers import RMSNorm
from megatron_taipan.model.stack import Recompute, recompute_all, residual_stream, run_layers, run_segment, total_budget
from megatron_taipan.model.stream import Stream
from megatron_taipan.ops.operations import Ops, reference_ops
from megatron_taipan.ops.selected_rows import (
    bounded_linear_reference,
    gather_linear_reference,
    scatter_rows_reference,
    select_rows_reference,
)
from megatron_taipan.parallel.one_rank import OneRank
from megatron_taipan.parameters import parameter_table

register_names(TaipanConfig.model_type)


@dataclass
class TaipanModelOutput(BaseModelOutputWithPast):
    """What `TaipanModel` gives: last_hidden_state [b, l, d] after the final norm, the cache, the layers' outputs."""

    budget_loss: Tensor | None = None  # sum over S layers of (capacity - selected fraction)^2, see GateConfig.budget


class TaipanPreTrainedModel(PreTrainedModel):
    """What transformers asks of every class of a model."""

    config_class = TaipanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    find_ops = staticmethod(reference_ops)  # `megatron_taipan.hf` puts its kernels here; an exported folder has none
    supports_gradient_checkpointing = True
    _is_stateful = True  # no assisted decoding: states cannot be rolled back
    _no_split_modules = sorted({block.__name__ for block in BLOCKS.values()})
    _input_embed_layer = "embedding"
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]  # where only the network under the head is loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Gives a parameter that no file held its initial value by the table (`model/init.py`)."""
        config = self.config.model_config()
        table = parameter_table(config)
        names = {id(parameter): table_name(name) for name, parameter in self.named_parameters()}
        for parameter in module.parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            name = names.get(id(parameter), "")
            if name in table:
                parameter.copy_(initial_value(name, table[name], config, 0))
            else:  # a classifier, or what transformers makes to enlarge the vocabulary
                parameter.normal_(0.0, config.init_std)
        for buffer in module.buffers(recurse=False):  # the gate's threshold
            if not getattr(buffer, "_is_hf_initialized", False):
                buffer.fill_(config.gate.threshold)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """transformers' switch; the layers are recomputed by the model itself."""
        network: Any = self.base_model
        network.gradient_checkpointing = enable

    def _float32_names(self, prefix: str) -> list[str]:
        """Names, as a class's state_dict has them, of what stays float32 in a bf16 or fp16 model."""
        fp32_params = [name for name, spec in parameter_table(self.config.model_config()).items() if spec.float32]
        return [f"{prefix}{name}" for name in (*fp32_params, *dict(self.base_model.named_buffers()))]


class TaipanModel(TaipanPreTrainedModel):
    """Embedding, layers and final norm of a Taipan: `AutoModel`, and `base_model` of the other classes.

    The layers are the trainer's own; the matrices in them are `nn.Linear` modules (see linears.py).
    """

    def __init__(self, config: TaipanConfig):
        super().__init__(config)
        network = config.model_config()
        self.ops = for_modules(self.find_ops())
        build = Build(network, parameter_table(network), 0, OneRank(), self.ops)
        self.embedding = nn.Embedding(network.vocab_size, network.d_model, device="meta")
        build.parameters(self.embedding, "embedding")
        self.layers = make_layers(build)
        hold_in_linears(self.layers)
        for layer in self.layers:
            layer.register_forward_pre_hook(arguments_beside)
        self.final_norm = RMSNorm(build, "final_norm")
        self.gate_config, self.residual_fp32 = network.gate, network.residual_fp32
        self.gradient_checkpointing = False
        self._train_step = 0  # draws fresh gate noise in every training step
        self._keep_in_fp32_modules_strict = self._float32_names("")
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TaipanCache | None = None,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: TaipanCache | None = None,
        **kwargs: Any,
    ) -> TaipanModelOutput | tuple:
        """Hidden states of the tokens, normed: what the head is applied to.

        Args:
            input_ids: [b, l]; or inputs_embeds: [b, l, d] in its place.
            output_hidden_states: give the residual stream before the first layer and after each but the last, whose
                entry is last_hidden_state; [b, l, d] each.
            Others: see `TaipanForCausalLM.forward`.

        Raises:
            ValueError, TypeError: see there.
        """
        check_arguments(self.forward, kwargs)
        check_tokens(input_ids, inputs_embeds)
        cache = one_cache(cache, past_key_values)
        if cache is None and use_cache:
            cache = TaipanCache()
        embedded = self.embedding(beside(self.embedding, input_ids)) if inputs_embeds is None else inputs_embeds
        if seq_idx is None:
            seq_idx = documents_of(embedded.shape[:2], attention_mask, kwargs, cache)
        self._train_step += self.training
        h = residual_stream(embedded, fp32=self.residual_fp32)
        state = self._state_of(cache, h) if cache is not None else None
        step = self._train_step if self.training else 0
        seq_idx = None if seq_idx is None else seq_idx.to(h.device)
        ctx = make_context(h[..., 0], seq_idx, None, step, settled(self.gate_config, step), state)
        if seq_idx is not None:  # after the cache has the caller's last numbers, to compare the next ones with
            ctx.seq_idx = numbered_by_run(seq_idx)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        between, found = [h], []
        if output_hidden_states:
            for index in range(len(self.layers)):
                h, measured = run_segment(self.layers, h, ctx, index, index + 1)
                between.append(h)
                found += measured
        else:
            recompute = Recompute(recompute_all) if self.gradient_checkpointing else None
            h, found = run_layers(self.layers, h, ctx, recompute)
        h = self.final_norm(beside(self.final_norm, h))
        kept: dict[str, Any] = {CACHE: cache, "hidden_states": (*between[:-1], h) if output_hidden_states else None}
        output = TaipanModelOutput(last_hidden_state=h, budget_loss=total_budget(found, h.device), **kept)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _state_of(self, cache: TaipanCache, h: Tensor) -> TaipanState:
        """The state inside `cache` for h [b, l, d], made on first use.

        Raises:
            ValueError: a cache of another model's kind, or of another number of rows.
        """
        if not isinstance(cache, TaipanCache):
            raise ValueError(f"the cache must be a TaipanCache or None, not a {type(cache).__name__}")
        if cache.state is None:
            cache.state = self.new_cache(len(h), h.device, self.final_norm.weight.dtype)
        rows = len(cache.state.layers[0].tensors()[0])
        if rows != len(h):
            raise ValueError(f"the cache holds {rows} rows, but input_ids has {len(h)}; they must be the same texts")
        return cache.state

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> TaipanState:
        """An empty state for `batch` rows, each layer's on the layer's device; `device` where that is meta."""
        places = [next(layer.parameters()).device for layer in self.layers]
        return new_cache(self.layers, batch, [device if place.type == "meta" else place for place in places], dtype)


def beside(module: nn.Module, x: Any) -> Any:
    """x, a tensor or what has a `to`, on the device of the module's weights, where layers are spread over several.

    As it is where those are on meta until accelerate's hook fetches them, which then moves x as well.
    """
    weight = next(module.parameters(), None)
    return x if weight is None or weight.is_meta else x.to(weight.device)


def arguments_beside(layer: nn.Module, args: tuple[Stream, Context, Any]) -> tuple[Stream, Context, Any]:
    """Before a layer is called: its arguments on its device. The state moves itself, as layers change it in place."""
    stream, ctx, *states = args
    moved = Stream(beside(layer, stream.h), None if stream.branch is None else beside(layer, stream.branch))
    return moved, beside(layer, ctx), *(None if s is None else beside(layer, s) for s in states)


def for_modules(ops: Ops) -> Ops:
    """The operations where the matrices of layers are modules.

    A module multiplies whole tensors, so the rows that a gate picked are taken out first, as many as there are: the
    kernels for rows would leave unset memory after them, which must not reach an adapter's gradient.
    """
    return replace(
        ops,
        select_rows=select_rows_reference,
        gather_linear=gather_linear_reference,
        bounded_linear=bounded_linear_reference,
        scatter_rows=scatter_rows_reference,
    )


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Raises:
    ValueError: not exactly one of them, or of a shape that holds no tokens.
    """
    if input_ids is not None and inputs_embeds is not None:
        raise ValueError("input_ids and inputs_embeds are two ways to give the tokens; pass one of them")
    name, given, rest = "input_ids", input_ids, ""
    if inputs_embeds is not None:
        name, given, rest = "inputs_embeds", inputs_embeds, ", d_model"
    if given is None or given.dim() != (3 if rest else 2) or 0 in given.shape:
        shape = "None" if given is None else list(given.shape)
        raise ValueError(f"{name} is {shape}, but must be [batch, length{rest}] of at least one token")


def one_cache(cache: TaipanCache | None, past_key_values: TaipanCache | None) -> TaipanCache | None:
    """The argument under either of its names.

    Raises:
        ValueError: two different ones.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
    return past_key_values if cache is None else cache


def documents_of(
    shape: torch.Size, mask: Tensor | None, kwargs: dict[str, Any], cache: TaipanCache | None
) -> Tensor | None:
    """Documents [b, l] of b rows of l tokens, from the mask or from positions that start again; None: one a row.

    Raises:
        ValueError: a mask or positions that do not fit; document borders for FlashAttention without either.
    """
    rows, length = shape
    past = cache.get_seq_length() if cache is not None else 0
    positions = kwargs.get("position_ids")
    if positions is None and kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("cu_seq_lens_q packs rows without saying which token is whose: pass position_ids or seq_idx")
    documents = documents_from_mask(mask, rows, length, past) if mask is not None else None
    packed = None
    if positions is not None:
        packed = documents_from_positions(positions, mask, length, cache is not None)
    return documents if packed is None else packed.expand(rows, -1)
