"""Models that tasks on text take, each with its tokenizer; looked at before weights are read, so that mistakes show
first."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_taipan.checkpoint.weights import ExportedWeights, open_weights
from megatron_taipan.errors import UserError
from megatron_taipan.inference.loading import DTYPES, find_tokenizer, load_model, parse_device
from megatron_taipan.inference.text import model_tokenizer
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class TextModel:
    """A model that is not loaded yet."""

    path: Path
    tokenizer: Tokenizer
    training_length: int | None  # tokens of the samples it was trained on; None: nothing says
    ema: bool = False  # with the moving average of the weights

    @property
    def name(self) -> str:
        """As results call it."""
        return f"{self.path} (EMA)" if self.ema else str(self.path)

    def load(self, options: Namespace) -> Taipan:
        """The network, on the device and in the type of the options."""
        model, _, _ = load_model(self.path, DTYPES[options.dtype], ema=self.ema)
        return model.to(parse_device(options.device))


def add_model_arguments(parser: ArgumentParser) -> None:
    """What every task on text takes of its models."""
    parser.add_argument("models", nargs="+", type=Path, help="checkpoints, runs' folders or exported folders")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file; default: each model's own")
    parser.add_argument("--ema", action="store_true", help="the weights' moving average (optim.ema_decay)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def find_models(options: Namespace) -> list[TextModel]:
    """The models of the options.

    Raises:
        UserError: a path holds no model, a model has no tokenizer, or the device is not there.
    """
    parse_device(options.device)
    return [find_model(path, options.tokenizer, ema=options.ema) for path in options.models]


def find_model(path: Path, tokenizer: Path | None, *, ema: bool = False) -> TextModel:
    """One of them.

    Args:
        tokenizer: the file to read in place of the model's own.
        ema: with the moving average of the weights.

    Raises:
        UserError: as for `find_models`.
    """
    opened = open_weights(path, ema=ema)
    named = tokenizer or find_tokenizer(opened)
    if named is None:
        raise UserError(f"{path} names no tokenizer; pass --tokenizer FILE")
    if isinstance(opened, ExportedWeights):
        return TextModel(path, model_tokenizer(named), opened.training_length)
    return TextModel(path, model_tokenizer(named, opened.config.data), opened.training_length, ema)
