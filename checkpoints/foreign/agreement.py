"""Whether imported weights compute what their own library computes: logits of one random prompt, as an export's check.

The library's model reads the source's files and settings by itself; ours takes what the import wrote. A setting that
was misunderstood, a tensor in the wrong place and a wrong file all show here.

The other library computes in float32 and ours in float64. The logits of a deep or wide model carry more rounding than
TOLERANCE (24 random Mamba-2 blocks of width 768: 9e-5 of the largest), so ours are computed in float32 too, and the
other's may be a few times as far away as those are.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoints.export_hf import LENGTH, ROWS, TOLERANCE, probe_of
from checkpoints.foreign.files import Read, Shapes
from checkpoints.foreign.loading import load_transformers_model
from checkpoints.streamed import stream
from megatron_taipan.errors import UserError
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig

ROUNDING = 4  # times the rounding of our own float32 logits that the other's may differ
CEILING = 1e-3  # of the largest logit: what is further away is not rounding
SCAN_CHUNK_TOKENS = 16  # the prompt crosses several chunks
# With rescale_prenorm_residual, which is about initial weights, transformers 5.23 scales loaded ones down as well.
CHANGES = {"chunk_size": SCAN_CHUNK_TOKENS, "rescale_prenorm_residual": False}


class Answer(NamedTuple):
    """What another implementation computes for a prompt."""

    who: str
    logits: Tensor | None  # [b, l, v] float32; None: it cannot compute this network
    why_not: str = ""


def compare_logits(network: ModelConfig, vocab_size: int, ask: Callable[[Tensor], Answer], load: Read) -> str:
    """Compares our network with another implementation on a random prompt.

    Args:
        network: the source's; vocab_size: ids that the import keeps, from 0; ask: gives the other one's answer to
            tokens [b, l]; load: gives the weights that are checked, by our names.

    Returns:
        A line for the user.

    Raises:
        UserError: the logits differ by more than TOLERANCE of the largest, and by more than rounding explains.
    """
    tokens = torch.randint(0, vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    answer = ask(tokens)
    if answer.logits is None:
        return f"the logits were NOT compared with another implementation: {answer.why_not}"
    network = network.model_copy(update={"vocab_size": vocab_size})
    exact, rounded = (our_logits(network, load, tokens, dtype) for dtype in (torch.float64, torch.float32))
    rounding = distance(rounded, exact)
    limit = min(max(TOLERANCE, ROUNDING * rounding), CEILING)
    difference = distance(answer.logits[..., :vocab_size], exact)
    if not difference <= limit:  # NaN must fail too
        raise UserError(
            f"the imported weights' logits differ from those of {answer.who} by {difference:.2e} of the largest (limit"
            f" {limit:.0e}, rounding {rounding:.0e}); nothing was written"
        )
    return f"logits agree with those of {answer.who} to {difference:.1e} (relative; float32 rounds by {rounding:.1e})"


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected logit; infinite where shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@torch.inference_mode()
def our_logits(network: ModelConfig, load: Read, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [b, l, v] of tokens [b, l], computed in `dtype`; the weights are read layer by layer."""
    with torch.device("meta"):
        model = Taipan(probe_of(network)).eval()
    stream(model, lambda name: load(name).to(dtype))
    return model(tokens).logits


def transformers_answer(folder: Path, name: str, tokens: Tensor) -> Answer:
    """What transformers' class `name` computes from the folder itself."""
    return _answer(load_transformers_model(folder, name, CHANGES), tokens)


def mamba_ssm_answer(network: ModelConfig, shapes: Shapes, read: Read, tokens: Tensor) -> Answer:
    """What transformers' Mamba2 computes from the tensors of a mamba_ssm model.

    mamba_ssm itself needs a GPU. The tensors are taken whole, as the file has them, but the settings are our reading.

    Args:
        network: those settings; shapes, read: the file's tensors.
    """
    from transformers import Mamba2Config, Mamba2ForCausalLM

    m = network.mamba
    config = Mamba2Config(
        vocab_size=network.vocab_size, hidden_size=network.d_model, num_hidden_layers=network.n_layers,
        layer_norm_epsilon=network.norm_eps, num_heads=network.mamba_heads, head_dim=m.headdim, state_size=m.d_state,
        expand=m.expand, n_groups=m.n_groups, conv_kernel=m.d_conv, use_conv_bias=m.conv_bias,
        chunk_size=SCAN_CHUNK_TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Mamba2ForCausalLM(config).eval()
    tensors = {name.replace(".embedding.", ".embeddings."): read(name) for name in shapes}
    tensors.setdefault("lm_head.weight", tensors["backbone.embeddings.weight"])
    model.load_state_dict(tensors, assign=True)
    return _answer(model, tokens)


@torch.inference_mode()
def _answer(model: Any, tokens: Tensor) -> Answer:
    from transformers import __version__

    who = f"{type(model).__name__} of transformers {__version__}"
    groups = getattr(model.config, "n_groups", 1)
    if groups > 1 and not _norms_groups(model):
        why = f"{who} has one gated norm for all n_groups={groups}; mamba_ssm, newer releases and M have one each"
        return Answer(who, None, why)
    return Answer(who, model(tokens, use_cache=False).logits.float())


def _norms_groups(model: nn.Module) -> bool:
    """Whether the gated norm knows of groups; in older releases of transformers it did not."""
    return any(hasattr(module, "group_size") for module in model.modules())
