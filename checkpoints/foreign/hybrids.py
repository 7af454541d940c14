"""Models of transformers that mix Mamba-2 with attention: GraniteMoeHybrid (Granite 4) and Bamba.

Their attention layers, with the MLP after them, are our `A` where the whole head turns by RoPE. Their Mamba-2 layers
have an MLP after them as well, and our `M` has none: only models whose layers are all attention can be taken.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints.foreign.agreement import compare_logits, transformers_answer
from checkpoints.foreign.files import Read, Shapes
from checkpoints.foreign.loading import read_config
from checkpoints.foreign.names import Names
from checkpoints.foreign.settings import FREE_IN_TRANSFORMERS, Rules, Settings, build_network, judge, refuse
from checkpoints.map_weights import Source, refuse_other_options
from megatron_taipan.model_config import ModelConfig

MAMBA_LAYERS = ("linear_attention", "mamba")  # the second in older files
# Of Mamba-2 layers; ignored where the model has none of these layers:
MAMBA_OPTIONS = {
    "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand",
    "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit",
}  # fmt: skip
SHARED = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
}  # fmt: skip
SETTINGS_WITHOUT_EFFECT = FREE_IN_TRANSFORMERS | MAMBA_OPTIONS | {
    "attention_dropout",  # in training only
    "max_position_embeddings",  # RoPE of type default does not depend on it
}  # fmt: skip
MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")

GRANITE = Rules(
    taken=frozenset(SHARED | {
        "shared_intermediate_size", "layer_types", *MULTIPLIERS,
    }),
    only={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "num_local_experts": (0,),
        "position_embedding_type": ("rope",),  # else attention without positions and without a window
    },
    free=SETTINGS_WITHOUT_EFFECT | {
        "intermediate_size", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef",  # of experts
        "init_method", "normalization_function",  # in IBM's files; no class reads them
    },
)  # fmt: skip

BAMBA = Rules(
    taken=frozenset(SHARED | {"intermediate_size", "attn_layer_indices"}),
    only={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
    free=SETTINGS_WITHOUT_EFFECT | {"z_loss_coefficient"},  # of the loss
)  # fmt: skip


def from_granite(folder: Path, target: ModelConfig, shapes: Shapes, read: Read) -> Source:
    """A folder of GraniteMoeHybridForCausalLM under our names, its multipliers multiplied into the weights.

    Raises:
        UserError: naming every difference from a stack of `A` layers, or tensors that are missing or left over.
    """
    settings, defaults = read_config(folder, "granitemoehybrid")
    refuse(folder, [f"{name}={settings[name]!r}" for name in MULTIPLIERS if not settings[name]])
    kinds = settings["layer_types"] or ["mamba"] * settings["num_hidden_layers"]
    s = _refuse_differences(folder, settings, defaults, GRANITE, kinds, "shared_mlp")
    network = _network(folder, target, s, s["shared_intermediate_size"])
    names = Names(folder, shapes, read)
    scale = (float(s["embedding_multiplier"]), 1.0 / s["logits_scaling"])
    names.head("model.embed_tokens.weight", "lm_head.weight", tied=s["tie_word_embeddings"], target=target, scale=scale)
    residual = float(s["residual_multiplier"])
    queries = s["attention_multiplier"] * math.sqrt(network.head_dim)  # our scores are divided by that root
    for index in range(network.n_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        _attention(names, ours, f"{theirs}.self_attn", queries, residual)
        names.whole(f"{ours}.norm.weight", f"{theirs}.input_layernorm.weight")
        names.whole(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight")
        halves = {"gate": network.d_ff, "up": network.d_ff}
        names.cut(f"{ours}.mlp.{{}}_proj", f"{theirs}.shared_mlp.input_linear.weight", halves)
        names.whole(f"{ours}.mlp.down_proj", f"{theirs}.shared_mlp.output_linear.weight", residual)
    names.whole("final_norm.weight", "model.norm.weight")
    ask = partial(transformers_answer, folder, "GraniteMoeHybridForCausalLM")
    return names.finish(network, partial(compare_logits, network, target.vocab_size, ask))


def from_bamba(folder: Path, target: ModelConfig, shapes: Shapes, read: Read) -> Source:
    """A folder of BambaForCausalLM under our names.

    Raises:
        UserError: as `from_granite`.
    """
    settings, defaults = read_config(folder, "bamba")
    attends = settings["attn_layer_indices"] or []
    kinds = ["attention" if i in attends else "mamba" for i in range(settings["num_hidden_layers"])]
    s = _refuse_differences(folder, settings, defaults, BAMBA, kinds, "feed_forward")
    network = _network(folder, target, s, s["intermediate_size"])
    names = Names(folder, shapes, read)
    names.head("model.embed_tokens.weight", "lm_head.weight", tied=s["tie_word_embeddings"], target=target)
    for index in range(network.n_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        _attention(names, ours, f"{theirs}.self_attn", 1.0, 1.0)
        names.whole(f"{ours}.norm.weight", f"{theirs}.input_layernorm.weight")
        names.whole(f"{ours}.mlp_norm.weight", f"{theirs}.pre_ff_layernorm.weight")
        for name in ("gate_proj", "up_proj", "down_proj"):
            names.whole(f"{ours}.mlp.{name}", f"{theirs}.feed_forward.{name}.weight")
    names.whole("final_norm.weight", "model.final_layernorm.weight")
    ask = partial(transformers_answer, folder, "BambaForCausalLM")
    return names.finish(network, partial(compare_logits, network, target.vocab_size, ask))


def _refuse_differences(
    folder: Path, settings: Settings, defaults: Settings, rules: Rules, kinds: list[str], mlp: str
) -> Settings:
    """The settings, where we have every layer's kind; `kinds`: of each layer; `mlp`: its name in their layers."""
    faults, _ = judge(settings, defaults, rules)
    mamba = [str(index) for index, kind in enumerate(kinds) if kind in MAMBA_LAYERS]
    if mamba:
        faults.insert(0, f"layers {','.join(mamba)} are Mamba-2 with an MLP after them ({mlp}), and M has none")
    rope: dict[str, Any] = settings.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        faults.append(f"rope_type={rope['rope_type']!r} (A turns by 'default' RoPE)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        faults.append(f"partial_rotary_factor={rope['partial_rotary_factor']} (RoPE turns the whole head in A)")
    other = sorted(rope.keys() - {"rope_type", "rope_theta", "partial_rotary_factor"})
    faults += [f"rope_parameters.{name}={rope[name]!r} (unknown here)" for name in other]
    refuse(folder, faults)
    return settings


def _network(folder: Path, target: ModelConfig, settings: Settings, d_ff: int) -> ModelConfig:
    s = settings
    sizes = {
        "pattern": f"A*{s['num_hidden_layers']}", "vocab_size": s["vocab_size"], "d_model": s["hidden_size"],
        "norm_eps": s["rms_norm_eps"], "d_ff": d_ff,
        "attention": {
            "n_heads": s["num_attention_heads"], "n_kv_heads": s["num_key_value_heads"],
            "head_dim": s.get("head_dim") or s["hidden_size"] // s["num_attention_heads"],
            "rope_theta": s["rope_parameters"]["rope_theta"],
        },
    }  # fmt: skip
    network = build_network(folder, target, sizes)
    refuse_other_options(folder, network, target)
    return network


def _attention(names: Names, ours: str, theirs: str, queries: float, output: float) -> None:
    """The four projections; `queries`, `output`: what q_proj and the layer's output are multiplied by elsewhere."""
    names.whole(f"{ours}.attention.q_proj", f"{theirs}.q_proj.weight", queries)
    names.whole(f"{ours}.attention.k_proj", f"{theirs}.k_proj.weight")
    names.whole(f"{ours}.attention.v_proj", f"{theirs}.v_proj.weight")
    names.whole(f"{ours}.attention.out_proj", f"{theirs}.o_proj.weight", output)
