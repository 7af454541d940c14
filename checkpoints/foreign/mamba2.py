"""Mamba-2 language models of transformers (`Mamba2ForCausalLM`) and of mamba_ssm (`MambaLMHeadModel`, layer Mamba2)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from checkpoints.foreign.agreement import Answer, compare_logits, mamba_ssm_answer, transformers_answer
from checkpoints.foreign.files import Read, Shapes
from checkpoints.foreign.loading import read_config
from checkpoints.foreign.names import Names
from checkpoints.foreign.settings import FREE_IN_TRANSFORMERS, Rules, Settings, build_network, judge, refuse
from checkpoints.map_weights import Source, refuse_other_options
from megatron_taipan.errors import UserError
from megatron_taipan.model_config import ModelConfig

NO_LIMIT = (0.0, float("inf"))

TRANSFORMERS = Rules(
    taken=frozenset({
        "vocab_size", "hidden_size", "num_hidden_layers", "layer_norm_epsilon", "tie_word_embeddings", "state_size",
        "num_heads", "head_dim", "expand", "n_groups", "conv_kernel", "use_conv_bias",
    }),
    only={
        "hidden_act": ("silu", "swish"),
        "use_bias": (False,),  # of both projections
        "time_step_limit": (NO_LIMIT,),
    },
    free=FREE_IN_TRANSFORMERS | {
        "time_step_min", "time_step_max", "time_step_floor", "time_step_rank", "time_step_scale",
        "time_step_init_scheme", "rescale_prenorm_residual",  # of initial weights
        "chunk_size",  # speed
        "residual_in_fp32",  # rounding under bf16; here model.residual_fp32 sets it
        "intermediate_size",  # written by 4.44; it is expand * hidden_size
    },
    unread={"norm_before_gate": False, "rms_norm": True},  # written by 4.44, Codestral's says True; no class reads them
)  # fmt: skip

MAMBA_SSM_DEFAULTS: Settings = {
    "d_intermediate": 0, "ssm_cfg.layer": "Mamba1", "attn_layer_idx": [], "rms_norm": True, "tie_embeddings": True,
    "ssm_cfg.d_state": 128, "ssm_cfg.d_conv": 4, "ssm_cfg.expand": 2, "ssm_cfg.headdim": 64, "ssm_cfg.ngroups": 1,
    "ssm_cfg.conv_bias": True,
}  # fmt: skip

MAMBA_SSM = Rules(  # MambaConfig and the arguments of Mamba2, as of mamba_ssm 2.2
    taken=frozenset({
        "vocab_size", "d_model", "n_layer", "tie_embeddings", "ssm_cfg.d_state", "ssm_cfg.d_conv", "ssm_cfg.expand",
        "ssm_cfg.headdim", "ssm_cfg.ngroups", "ssm_cfg.conv_bias",
    }),
    only={
        "ssm_cfg.layer": ("Mamba2",),
        "d_intermediate": (0,),  # an MLP after every mixer
        "attn_layer_idx": ((), None),
        "rms_norm": (True,),  # else LayerNorm
        "ssm_cfg.rmsnorm": (True,),  # else y * silu(z) without a norm
        "ssm_cfg.norm_before_gate": (False,),
        "ssm_cfg.dt_limit": (NO_LIMIT,),
        "ssm_cfg.bias": (False,),
        "ssm_cfg.D_has_hdim": (False,),  # one D a channel, not one a head
        "ssm_cfg.d_ssm": (None,),  # fewer channels in the scan than d_inner; the others in a gated MLP
        "ssm_cfg.activation": ("silu", "swish"),
    },
    free=frozenset({
        "attn_cfg",  # of the layers in attn_layer_idx
        "residual_in_fp32",  # rounding under bf16; here model.residual_fp32 sets it
        "fused_add_norm", "ssm_cfg.chunk_size", "ssm_cfg.use_mem_eff_path", "ssm_cfg.sequence_parallel",  # speed
        "pad_vocab_size_multiple",  # seen in the embedding's rows
        "ssm_cfg.conv_init", "ssm_cfg.A_init_range", "ssm_cfg.dt_min", "ssm_cfg.dt_max",
        "ssm_cfg.dt_init_floor",  # of initial weights
    }),
)  # fmt: skip

EPS = 1e-5  # of every norm in mamba_ssm; no setting changes it


def from_transformers(folder: Path, target: ModelConfig, shapes: Shapes, read: Read) -> Source:
    """A folder of transformers' Mamba2ForCausalLM under our names.

    Raises:
        UserError: it computes something that `M` layers do not, its sizes are not the target's, or tensors are
            missing or left over.
    """
    settings, defaults = read_config(folder, "mamba2")
    faults, notes = judge(settings, defaults, TRANSFORMERS)
    refuse(folder, faults)
    s = settings
    network = build_network(folder, target, {
        "pattern": f"M*{s['num_hidden_layers']}", "vocab_size": s["vocab_size"], "d_model": s["hidden_size"],
        "norm_eps": s["layer_norm_epsilon"],
        "mamba": {
            "d_state": s["state_size"], "headdim": s["head_dim"], "expand": s["expand"], "n_groups": s["n_groups"],
            "d_conv": s["conv_kernel"], "conv_bias": s["use_conv_bias"],
        },
    })  # fmt: skip
    ask = partial(transformers_answer, folder, "Mamba2ForCausalLM")
    names = Names(folder, shapes, read)
    names.notes += notes
    names.head("backbone.embeddings.weight", "lm_head.weight", tied=s["tie_word_embeddings"], target=target)
    return _finish(names, network, target, ask)


def from_mamba_ssm(folder: Path, target: ModelConfig, settings: Settings, shapes: Shapes, read: Read) -> Source:
    """A folder of mamba_ssm's MambaLMHeadModel, as the state-spaces/mamba2-* models are, under our names.

    Raises:
        UserError: as `from_transformers`.
    """
    inner = settings.get("ssm_cfg") or {}
    if not isinstance(inner, dict):
        raise UserError(f"{folder}/config.json: ssm_cfg={inner!r} holds no settings")
    s: Settings = MAMBA_SSM_DEFAULTS | {key: value for key, value in settings.items() if key != "ssm_cfg"}
    s |= {f"ssm_cfg.{key}": value for key, value in inner.items()}
    if s["ssm_cfg.layer"] != "Mamba2":  # its other settings are another layer's
        raise UserError(f"{folder} has ssm_cfg.layer={s['ssm_cfg.layer']!r} (absent means Mamba1), not Mamba2")
    missing = [key for key in ("d_model", "n_layer", "vocab_size") if key not in s]
    if missing:
        raise UserError(f"{folder}/config.json does not say {' and '.join(missing)}")
    embedding = "backbone.embedding.weight"
    network = build_network(folder, target, {
        "pattern": f"M*{s['n_layer']}", "d_model": s["d_model"], "norm_eps": EPS,
        "vocab_size": shapes.get(embedding, (s["vocab_size"],))[0],  # padded
        "mamba": {
            "d_state": s["ssm_cfg.d_state"], "headdim": s["ssm_cfg.headdim"], "expand": s["ssm_cfg.expand"],
            "n_groups": s["ssm_cfg.ngroups"], "d_conv": s["ssm_cfg.d_conv"], "conv_bias": s["ssm_cfg.conv_bias"],
        },
    })  # fmt: skip
    if s.get("ssm_cfg.d_ssm") == network.d_inner:  # all channels, as where it is null
        s["ssm_cfg.d_ssm"] = None
    faults, notes = judge(s, {}, MAMBA_SSM)
    refuse(folder, faults)
    names = Names(folder, shapes, read)
    names.notes += notes
    names.head(embedding, "lm_head.weight", tied=s["tie_embeddings"], target=target)
    return _finish(names, network, target, partial(mamba_ssm_answer, network, shapes, read))


def _finish(names: Names, network: ModelConfig, target: ModelConfig, ask: Callable[[Tensor], Answer]) -> Source:
    """The blocks, which both libraries name alike, and the comparison.

    in_proj holds the rows of z, x, B, C and dt one after the other, conv1d the channels of x, B and C.
    """
    refuse_other_options(names.folder, network, target)
    inner, states = network.d_inner, network.mamba.n_groups * network.mamba.d_state
    for index in range(network.n_layers):
        ours, mixer = f"layers.{index}", f"backbone.layers.{index}.mixer"
        names.whole(f"{ours}.norm.weight", f"backbone.layers.{index}.norm.weight")
        rows = {"z": inner, "x": inner, "B": states, "C": states, "dt": network.mamba_heads}
        names.cut(f"{ours}.mixer.in_proj_{{}}", f"{mixer}.in_proj.weight", rows)
        channels = {"x": inner, "B": states, "C": states}
        names.cut(f"{ours}.mixer.conv_{{}}_weight", f"{mixer}.conv1d.weight", channels)
        if network.mamba.conv_bias:
            names.cut(f"{ours}.mixer.conv_{{}}_bias", f"{mixer}.conv1d.bias", channels)
        for name in ("dt_bias", "A_log", "D"):
            names.whole(f"{ours}.mixer.{name}", f"{mixer}.{name}")
        names.whole(f"{ours}.mixer.norm_weight", f"{mixer}.norm.weight")
        names.whole(f"{ours}.mixer.out_proj", f"{mixer}.out_proj.weight")
    names.whole("final_norm.weight", "backbone.norm_f.weight")
    return names.finish(network, partial(compare_logits, network, target.vocab_size, ask))
