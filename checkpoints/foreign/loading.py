"""transformers' own reading of a folder: its settings with every default filled in, and the model."""

from pathlib import Path
from typing import Any

from torch import float32, nn

from checkpoints.foreign.settings import Settings
from megatron_taipan.errors import UserError


def read_config(folder: Path, model_type: str) -> tuple[Settings, Settings]:
    """Every setting as the model would see it, and what each is where a file says nothing.

    Raises:
        UserError: transformers does not accept config.json.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(model_type)
        return type(config).from_pretrained(folder).to_dict(), config.to_dict()
    except Exception as error:  # its checks raise types of several libraries
        raise UserError(f"transformers does not accept {folder}/config.json: {_first_line(error)}") from error


def load_transformers_model(folder: Path, name: str, changes: dict[str, Any]) -> nn.Module:
    """The folder as transformers loads it, in float32, and with the plainest attention.

    Args:
        name: of the class; changes: of settings that change no result, made where the class has them.

    Raises:
        UserError: it cannot load it.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()  # what it would warn of shows in the logits
    logging.disable_progress_bar()
    kind: Any = getattr(transformers, name)
    try:
        config = kind.config_class.from_pretrained(folder)
        for key in changes.keys() & config.to_dict().keys():
            setattr(config, key, changes[key])
        model = kind.from_pretrained(folder, config=config, dtype=float32, attn_implementation="eager")
    except Exception as error:
        raise UserError(f"transformers' {name} cannot load {folder}: {_first_line(error)}") from error
    return model.eval()


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
