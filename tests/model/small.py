"""Small networks whose weights are large enough that every layer matters."""

import torch
from torch import Tensor

from megatron_taipan.model.blocks import SelectiveAttentionBlock
from megatron_taipan.model.context import Context
from megatron_taipan.model.gate import Selection
from megatron_taipan.model.gate_settings import GateSettings, settled
from megatron_taipan.model.stream import Stream
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parallel.context import ContextParallel

VOCABULARY = 37
TREE = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_ff": 32,
    "init_std": 0.2,
    "mamba": {"d_state": 8, "headdim": 8, "n_groups": 2, "chunk_size": 5},
    "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "window": 6},
    "gate": {"capacity": 0.4},
}


def small_config(pattern: str, **changes) -> ModelConfig:
    """Changes are merged section by section: gate={"tau": 2.0} keeps the other gate options."""
    tree = TREE | {"pattern": pattern}
    for key, value in changes.items():
        tree = tree | {key: {**tree[key], **value} if isinstance(value, dict) else value}
    return ModelConfig.model_validate(tree)


def told(**gate) -> GateSettings:
    """What the gates of a small network with these options are told where no trainer speaks."""
    return settled(small_config("S", gate=gate).gate)


def small_model(
    pattern: str,
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 1,
    place: ContextParallel | None = None,
    **changes,
) -> Taipan:
    """In training mode; norms, biases and D are moved off their ones and zeros, so that none of them is idle."""
    model = Taipan(small_config(pattern, **changes), seed=seed, context_parallel=place)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name and "dt_bias" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.2)
    return model.to(dtype)


def selecting(layer: SelectiveAttentionBlock, stream: Stream, ctx: Context) -> tuple[Stream, Selection]:
    """The layer's output, and what its gate decided on the way."""
    kept: list[Selection] = []
    hook = layer.gate.register_forward_hook(lambda _, __, selection: kept.append(selection))
    out, _ = layer(stream, ctx)
    hook.remove()
    (selection,) = kept
    return out, selection


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def documents(*lengths: int) -> Tensor:
    """One row [1, sum] of documents of these lengths."""
    return torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))[None]


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
