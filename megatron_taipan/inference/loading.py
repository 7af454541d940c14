"""A model for evaluation or generation from what training or export left on disk."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_taipan.checkpoint.weights import CheckpointWeights, ExportedWeights, open_weights
from megatron_taipan.config import Config
from megatron_taipan.errors import UserError
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parallel.context import ContextParallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the CPU.

    Raises:
        UserError: torch does not know the device, or it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)  # torch knows names of devices that its build does not have
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} GPUs")
    return device


def build_with_weights(
    config: ModelConfig,
    load: Callable[[str], Tensor],
    dtype: torch.dtype = torch.float32,
    place: ContextParallel | None = None,
) -> Taipan:
    """A whole Taipan in evaluation mode with the given weights.

    Args:
        load: gives the full float32 tensor of a parameter or buffer by name.
        dtype: of the computation; float32 parameters stay float32.
        place: which piece of its rows this rank holds; None: whole rows.
    """
    with torch.device("meta"):
        model = Taipan(config, context_parallel=place)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(load(name))
    model.requires_grad_(False)
    if dtype == torch.bfloat16:
        model.bfloat16()
    return model.eval()


def load_model(
    path: Path, dtype: torch.dtype = torch.float32, *, ema: bool = False, place: ContextParallel | None = None
) -> tuple[Taipan, Path | None, Config | None]:
    """The model in a training checkpoint or an exported folder.

    Args:
        ema: with the moving average of the weights that the run kept.
        place: as in `build_with_weights`.

    Returns:
        the model on the CPU, its tokenizer file if known, and the run's configuration if it is a checkpoint.

    Raises:
        UserError: the path holds neither.
    """
    opened = open_weights(path, ema=ema)
    model = build_with_weights(opened.network, opened.load, dtype, place)
    return model, find_tokenizer(opened), None if isinstance(opened, ExportedWeights) else opened.config


def find_tokenizer(opened: CheckpointWeights | ExportedWeights) -> Path | None:
    """The tokenizer file that belongs to the weights, if they name one."""
    if isinstance(opened, ExportedWeights):
        tokenizer = opened.path / "tokenizer.json"
        return tokenizer if tokenizer.is_file() else None
    named = opened.config.data.tokenizer
    return Path(named) if named else None
