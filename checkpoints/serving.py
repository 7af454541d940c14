"""How an export's tensors map to the layers of a serving engine that has fused projections: vLLM's, above all.

Names and orders are those of vLLM's `MambaMixer2` (vllm/model_executor/layers/mamba/mamba_mixer2.py), and of its usual
`qkv_proj`, `o_proj` and `gate_up_proj`. See docs/serving.md: no plug-in was run.
"""

from dataclasses import dataclass

from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parameters import parameter_table

FUSED_IN_MIXER = {  # a parameter of MambaMixer2 -> ours, whose rows it holds one after the other
    "in_proj.weight": ("in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt"),
    "conv1d.weight": ("conv_x_weight", "conv_B_weight", "conv_C_weight"),
    "conv1d.bias": ("conv_x_bias", "conv_B_bias", "conv_C_bias"),
    "A": ("A_log",),  # its loader makes -exp of it
    "D": ("D",),
    "dt_bias": ("dt_bias",),
    "norm.weight": ("norm_weight",),
    "out_proj.weight": ("out_proj",),
}
FUSED_IN_ATTENTION = {
    "qkv_proj.weight": ("q_proj", "k_proj", "v_proj"),
    "o_proj.weight": ("out_proj",),
}
FUSED_IN_MLP = {
    "gate_up_proj.weight": ("gate_proj", "up_proj"),  # silu(first half) * second half
    "down_proj.weight": ("down_proj",),
}


@dataclass(frozen=True)
class Joined:
    """A tensor of the engine: `parts`, tensors of the export (without `model.`), joined along dimension 0."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]


def served_weights(network: ModelConfig) -> dict[str, Joined]:
    """Every tensor of the network under the engine's name; what is not fused keeps its own (norms, gates, embedding).

    The gates' thresholds, buffers [] of the S layers, keep theirs too and are not in the table.
    """
    table = {name: spec.shape for name, spec in parameter_table(network).items()}
    joined: dict[str, Joined] = {}
    for name in table:
        head, _, last = name.rpartition(".")
        fused = {"mixer": FUSED_IN_MIXER, "attention": FUSED_IN_ATTENTION, "mlp": FUSED_IN_MLP}.get(
            head.rpartition(".")[2], {}
        )
        theirs, parts = next((pair for pair in fused.items() if last in pair[1]), (last, (last,)))
        whole = tuple(f"{head}.{part}" for part in parts)
        shape = (sum(table[part][0] for part in whole), *table[whole[0]][1:])
        if theirs == "conv1d.weight":
            shape = (shape[0], 1, shape[1])
        joined[f"{head}.{theirs}"] = Joined(whole, shape)
    return joined


def mixer_arguments(network: ModelConfig) -> dict[str, int | float | bool | str]:
    """What `MambaMixer2` is made with."""
    m = network.mamba
    return {
        "hidden_size": network.d_model, "ssm_state_size": m.d_state, "conv_kernel_size": m.d_conv,
        "intermediate_size": network.d_inner, "use_conv_bias": m.conv_bias, "use_bias": False,
        "n_groups": m.n_groups, "num_heads": network.mamba_heads, "head_dim": m.headdim,
        "rms_norm_eps": network.norm_eps, "activation": "silu",
    }  # fmt: skip


def mamba_state_shapes(network: ModelConfig) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """What an `M` layer keeps of a request: inputs of the convolution [d_conv - 1, channels], SSM state [h, p, n]."""
    m = network.mamba
    channels = network.d_inner + 2 * m.n_groups * m.d_state
    return (m.d_conv - 1, channels), (network.mamba_heads, m.headdim, m.d_state)
