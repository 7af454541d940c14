"""`python -m megatron_taipan.evaluation.perplexity MODEL ...`: perplexity on a tokenized dataset.

All models see the same samples. `--untrained` adds the first model's network with its initial weights, to show what
training changed. `--lengths 1K,4K,...,1M` scores contexts of these lengths, read in chunks through the decoding cache.

Started as several processes (torchrun, srun), each holds a consecutive piece of every context, for those that are too
long for one; the scores are the same.
"""

import argparse
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from megatron_taipan.checkpoint.weights import CheckpointWeights, ExportedWeights, open_weights
from megatron_taipan.config import Config
from megatron_taipan.data.batch import Batch
from megatron_taipan.data.loader import SampleDataset, build_dataset
from megatron_taipan.data.made_with import refuse_mixed
from megatron_taipan.data_config import DataConfig, DataSource
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.lengths import parse_lengths
from megatron_taipan.evaluation.ranks import Ranks, joined_ranks
from megatron_taipan.evaluation.results import Row, make_folder, write_results
from megatron_taipan.inference.loading import DTYPES, build_with_weights, parse_device
from megatron_taipan.inference.selection_watch import watched_selection
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.all_ranks import run_on_all_ranks
from megatron_taipan.parallel.pieces import refuse_unfit_pieces
from megatron_taipan.parallel.processes import exits_cleanly_on_ranks, find_place, finish

INPUTS = ("tokens", "labels", "loss_mask", "seq_idx")  # of a batch, [b, l] each


@dataclass(frozen=True)
class Score:
    """Mean over the scored tokens of a dataset."""

    ce: float  # cross entropy in nats
    tokens: int  # tokens it is the mean of; the first of a document is not scored

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.ce, 700.0))  # exp overflows beyond


@torch.inference_mode()
def score(model: Taipan, dataset: SampleDataset, *, samples: int, batch: int = 1) -> Score:
    """Cross entropy of the first `samples` samples (at most one epoch), in evaluation mode; of all pieces of the rows
    where ranks hold one each (collective).

    Args:
        batch: rows per forward pass; changes speed, not results.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for rows in read_batches(dataset, samples, batch):
        tokens, labels, mask, seq_idx = (rows[name].to(device) for name in INPUTS)  # [b, l] each
        which = rows["sample"].to(device)  # [b], what a random gate draws by, not by a row's position in its batch
        out = model(
            tokens, labels=labels, loss_mask=mask, seq_idx=seq_idx, samples=which,
            document_start=rows.get("document_start"), ce_scale=1.0,
        )  # fmt: skip
        total += float(out.ce_loss)
        count += int(mask.count_nonzero())  # of 0 and 1; float32 counts to 2^24
    model.train(was_training)
    if model.place is not None:
        sums = torch.tensor([total, count], dtype=torch.float64, device=device)
        total, count = model.place.sum_pieces(sums).tolist()
    return mean_score(total, int(count))


def read_batches(dataset: SampleDataset, samples: int, batch: int) -> Iterator[Batch]:
    """The first `samples` samples (at most one epoch), up to `batch` of them at a time.

    Raises:
        UserError: the data is damaged; on all ranks, if only one of them has read that.
    """
    samples = min(samples, len(dataset))
    for first in range(0, samples, batch):
        read = partial(dataset.batch, list(range(first, min(first + batch, samples))))
        yield read() if dataset.piece.size == 1 else run_on_all_ranks(read)


def mean_score(total: float, count: int) -> Score:
    """The score of a sum of cross entropies in nats.

    Raises:
        UserError: there are no tokens.
    """
    if not count:
        raise UserError("the dataset has no token to score: every document is one token long")
    return Score(total / count, count)


@exits_cleanly_on_ranks
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    from megatron_taipan.evaluation import perplexity_by_length as by_length  # it scores as this module does

    parser = scoring_parser("perplexity", __doc__)
    parser.add_argument("--untrained", action="store_true", help="also score the initial weights")
    parser.add_argument("--out", type=Path, help="folder for perplexity.json and .md, with --lengths .svg as well")
    by_length.add_arguments(parser)
    options = parse_options(parser, arguments)
    started = find_place(os.environ)
    if started.world_size > 1:
        refuse_unfit(options, started.world_size)
    with joined_ranks(started, options.device) as ranks:
        ranks.on_first(lambda: make_folder(options.out))
        if options.lengths is not None:
            by_length.run(options, ranks)
        else:
            run(options, ranks)
    return 0


def refuse_unfit(options: argparse.Namespace, processes: int) -> None:
    """Whether the contexts can be cut into a piece for each process; reads no weights.

    Raises:
        UserError: they cannot, with the numbers.
    """
    opened = [open_weights(path, ema=options.ema) for path in options.models]
    if options.lengths is not None:
        name, lengths = "--lengths", parse_lengths(options.lengths)
    else:
        name, lengths = "--seq-len", [data_for(opened[0], options, options.seq_len).seq_len]
    for length, weights in itertools.product(lengths, opened):
        refuse_unfit_pieces(weights.network, length, processes, rows=name, ranks="processes")


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Scores every model on the same samples; prints, and writes what --out asks for."""
    print(f"{'model':<48} {'perplexity':>12} {'cross entropy':>14} {'tokens':>10}")
    rows: list[Row] = []
    for label, model, dataset in read_models(options, options.untrained, ranks):
        result = score(model, dataset, samples=options.samples, batch=options.batch)
        print(f"{label:<48} {result.perplexity:>12.2f} {result.ce:>14.4f} {result.tokens:>10,}", flush=True)
        rows.append(
            {"model": label, "perplexity": result.perplexity, "cross entropy": result.ce, "tokens": result.tokens}
        )
    if options.out is not None:
        about = {
            "data": name_data(options),
            "samples": options.samples,
            "dtype": options.dtype,
            "device": options.device,
        }
        ranks.on_first(lambda: write_results(options.out, "perplexity", rows, about=about, title="Perplexity"))


def scoring_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments of a program that scores models on a tokenized dataset."""
    parser = argparse.ArgumentParser(prog=f"python -m megatron_taipan.evaluation.{program}", description=description)
    parser.add_argument("models", nargs="+", type=Path, help="checkpoints, runs' folders or exported folders")
    parser.add_argument("--data", help="prefix of a .bin/.idx pair; default: the checkpoint's own data")
    parser.add_argument("--split", choices=("train", "valid"), default="valid", help="of the checkpoint's own data")
    parser.add_argument("--seq-len", type=int, help="tokens per sample; default: as in training")
    parser.add_argument("--samples", type=int, default=64, help="samples scored")
    parser.add_argument("--batch", type=int, default=4, help="samples per forward pass")
    parser.add_argument("--ema", action="store_true", help="the weights' moving average (optim.ema_decay)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="auto")
    return parser


def parse_options(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        UserError: a number is below one.
    """
    options = parser.parse_args(arguments)
    for name in ("seq_len", "samples", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least 1")
    return options


def read_models(
    options: argparse.Namespace, untrained: bool = False, ranks: Ranks | None = None
) -> Iterator[tuple[str, Taipan, SampleDataset]]:
    """Each model named, on its device, with its label and the one dataset that all are scored on.

    Args:
        untrained: begin with the first model's network as it is before training.
        ranks: those that the rows are shared out over; None: this process is alone.
    """
    ranks = ranks or Ranks(parse_device(options.device))
    split: Literal["train", "valid"] = "train" if options.data or options.split == "train" else "valid"
    dataset: SampleDataset | None = None
    for label, model, opened in each_model(options, untrained, ranks):
        if dataset is None:
            data = data_for(opened, options, options.seq_len)
            build = partial(build_dataset, data, split, model.config.vocab_size, ranks.piece)
            dataset = ranks.on_all(build)
        dataset.vocab_size = model.config.vocab_size  # the first model's may be larger
        yield label, model, dataset


def each_model(
    options: argparse.Namespace, untrained: bool, ranks: Ranks
) -> Iterator[tuple[str, Taipan, CheckpointWeights | ExportedWeights]]:
    """Each model named, on its rank's device: its label, the network, where its weights are from. When the next one is
    asked for, it is said where the gates selected far from what they were trained for.

    Args:
        untrained: begin with the first model's network as it is before training.
    """
    device, dtype = ranks.device, DTYPES[options.dtype]
    for path in options.models:
        opened = ranks.on_all(partial(open_weights, path, ema=options.ema))
        model = ranks.on_all(partial(build_with_weights, opened.network, opened.load, dtype, ranks.place))
        if untrained and path is options.models[0]:
            seed = 0 if isinstance(opened, ExportedWeights) else opened.config.train.seed
            yield "untrained", Taipan(model.config, seed=seed, context_parallel=ranks.place).to(device), opened
        label = f"{path} (EMA)" if options.ema else str(path)
        with watched_selection(model, label):
            yield label, model.to(device), opened


def name_data(options: argparse.Namespace) -> str:
    """The data that the models are scored on, in words."""
    return options.data or f"{options.split} documents of {options.models[0]}"


def data_for(
    opened: CheckpointWeights | ExportedWeights, options: argparse.Namespace, seq_len: int | None
) -> DataConfig:
    """`choose_data` for opened weights and --data."""
    config = None if isinstance(opened, ExportedWeights) else opened.config
    return choose_data(config, options.data, seq_len, opened.path)


def choose_data(config: Config | None, prefix: str | None, seq_len: int | None, path: Path) -> DataConfig:
    """The data to score: a dataset named on the command line (all of it), or what the checkpoint was trained with.

    Raises:
        UserError: neither is there, or the dataset was made with another tokenizer than the model's data.
    """
    if prefix is None:
        if config is None:
            raise UserError(
                f"{path} is an exported folder and names no data: pass --data PREFIX, and --lengths or --seq-len"
            )
        return config.data.model_copy(update={"seq_len": seq_len or config.data.seq_len})
    length = seq_len or (config.data.seq_len if config else None)
    if length is None:
        raise UserError(f"{path} does not say how many tokens its samples had: pass --seq-len")
    if config:
        refuse_mixed([*(source.prefix for source in config.data.train), prefix])
    tokenizer = config.data.tokenizer if config else None
    return DataConfig(train=[DataSource(prefix=prefix)], seq_len=length, valid_fraction=0.0, tokenizer=tokenizer)


if __name__ == "__main__":
    finish(main())
