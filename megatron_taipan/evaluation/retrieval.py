"""`python -m megatron_taipan.evaluation retrieval MODEL ...`: are values of the context found again?

    passkey    a five-digit number in a repeated text (arXiv 2305.16300)
    needle     a sentence with a number, hidden between other sentences (arXiv 2404.06654)
    phonebook  the number of a name, of a list that fills the context (arXiv 2402.01032)
    recall     the partner of every word of a list of pairs (the rows of experiments/recall_task.py, in words)

The first three are scored by greedy generation, for every length and depth: the answer counts if it begins with the
value. `recall` asks many values of one text and is scored by exact ranking, in one pass, for every length and number of
pairs: a value counts if each of its tokens is the most likely one, which is when greedy generation would give it.

Lengths are tokens of each model's own tokenizer, and may go beyond the length that a model was trained on; those are
marked *. Texts are read in chunks through the decoding cache.
"""

import argparse
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.found_again import count_ranked_first, find_values
from megatron_taipan.evaluation.lengths import length_name, parse_lengths
from megatron_taipan.evaluation.passkey import spread_depths
from megatron_taipan.evaluation.results import Row, describe_options, make_folder, markdown_table, write_results
from megatron_taipan.evaluation.retrieval_prompts import DEPTH_KINDS, PHONEBOOK, Filler, make_recall, read_filler
from megatron_taipan.evaluation.text_models import TextModel, add_model_arguments, find_models
from megatron_taipan.inference.selection_watch import watched_selection
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly

RECALL = "recall"
KINDS = (*DEPTH_KINDS, RECALL)
SHARES = (-0.02, 1.02)  # of an axis of shares, with room for the points at its ends


class Cell(NamedTuple):
    """What one number of the result is about."""

    kind: str
    length: int
    depth: float | None  # of the three kinds that have one
    pairs: int | None  # of recall

    def draw(self, seed: int, sample: int) -> random.Random:
        """The generator of one sample, the same for every model and whatever else is asked."""
        return random.Random(f"{seed} {self.kind} {self.length} {self.depth} {self.pairs} {sample}")


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    options = parse_options(arguments)
    filler, cells, models = read_filler(options.filler), list_cells(options), find_models(options)
    for model in models:
        refuse_unfit(model, cells, filler)
    make_folder(options.out)
    rows = []
    for model in models:
        network = model.load(options)
        total = len(cells) * options.samples
        with (
            watched_selection(network, model.name),
            tqdm(total=total, desc=model.name, file=sys.stderr, dynamic_ncols=True) as bar,
        ):
            for cell in cells:
                rows.append(score_cell(model, network, cell, options, filler, bar))
        del network  # before the next one is read
    if options.out is not None:
        about = describe_options(options)
        about["scored by"] = "exact ranking of every token: recall; greedy generation: the others"
        write_results(options.out, "retrieval", rows, about=about, title="Retrieval from the context")
        draw_figures(options.out, rows, models)
    print(markdown_table(rows))
    return 0


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with kinds, lengths and pairs as lists.

    Raises:
        UserError: one of them cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_taipan.evaluation retrieval", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_arguments(parser)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--lengths", default="512,1K,2K", help="tokens of the texts, such as 1K,4K or 1K,4K,...,256K")
    parser.add_argument("--depths", type=int, default=5, help="places of the value, evenly from the start to the end")
    parser.add_argument("--pairs", default="4,8,16", help="of recall, each twice in a text")
    parser.add_argument("--samples", type=int, default=10, help="texts for each length and depth or number of pairs")
    parser.add_argument("--batch", type=int, default=10, help="texts per pass; less takes less memory")
    parser.add_argument("--filler", type=Path, help="UTF-8 text to hide the needle in; default: built-in sentences")
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    parser.add_argument("--out", type=Path, help="folder for retrieval.json, retrieval.md and pictures")
    options = parser.parse_args(arguments)
    options.kinds = [word.strip() for word in options.kinds.split(",")]
    unknown = [kind for kind in options.kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"--kinds: {unknown[0]!r} is none of {', '.join(KINDS)}")
    options.lengths, pairs = parse_lengths(options.lengths), options.pairs.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in pairs):
        raise UserError(f"--pairs={options.pairs} must be whole numbers of at least 1, separated by commas")
    options.pairs = sorted({int(word) for word in pairs})
    for name in ("depths", "samples", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)} must be at least 1")
    return options


def list_cells(options: argparse.Namespace) -> list[Cell]:
    """Everything that is asked of each model, shortest texts first."""
    depths = spread_depths(options.depths)
    return [
        cell
        for length in options.lengths
        for kind in KINDS
        if kind in options.kinds
        for cell in (
            [Cell(kind, length, None, pairs) for pairs in options.pairs]
            if kind == RECALL
            else [Cell(kind, length, depth, None) for depth in depths]
        )
    ]


def refuse_unfit(model: TextModel, cells: Sequence[Cell], filler: Filler) -> None:
    """Makes one text of the shortest length of every kind, and a phonebook, for which there may be too few names, of
    the longest, so that what does not fit is said before hours of work."""
    lengths = [cell.length for cell in cells]
    for cell in cells:
        tried = cell.length == min(lengths) or (cell.kind == PHONEBOOK and cell.length == max(lengths))
        if tried and cell.depth in (None, 0.0):
            try:
                make_one(model, cell, cell.draw(0, 0), filler)
            except UserError as error:
                raise UserError(f"{model.name}: {cell.kind}: {error}") from error


def make_one(model: TextModel, cell: Cell, draw: random.Random, filler: Filler) -> Any:
    """One text of a cell: an Example, or a RankedText of recall."""
    if cell.pairs is not None:
        return make_recall(model.tokenizer, cell.length, cell.pairs, draw, filler)
    assert cell.depth is not None
    return DEPTH_KINDS[cell.kind](model.tokenizer, cell.length, cell.depth, draw, filler)


def score_cell(
    model: TextModel, network: Taipan, cell: Cell, options: argparse.Namespace, filler: Filler, bar: tqdm
) -> Row:
    """One row of the result."""
    found = asked = 0
    for numbers in in_parts(options.samples, options.batch):
        made = [make_one(model, cell, cell.draw(options.seed, i), filler) for i in numbers]
        if cell.pairs is None:
            found += sum(find_values(network, model.tokenizer, made))
            asked += len(made)
        else:
            found += sum(count_ranked_first(network, text) for text in made)
            asked += sum(len(text.values) for text in made)
        bar.update(len(made))
    beyond = None if model.training_length is None else cell.length > model.training_length
    return {
        "model": model.name, "kind": cell.kind, "length": cell.length, "beyond training": beyond, "depth": cell.depth,
        "pairs": cell.pairs, "asked": asked, "found": found, "accuracy": found / asked,
    }  # fmt: skip


def in_parts(count: int, size: int) -> Iterator[range]:
    """The numbers below `count`, up to `size` at a time."""
    for first in range(0, count, size):
        yield range(first, min(first + size, count))


def draw_figures(folder: Path, rows: list[Row], models: list[TextModel]) -> None:
    """A heat map of length and depth for every model and kind; curves of recall by pairs, and of all by length."""
    from megatron_taipan.evaluation.figures import Curve, write_curves, write_heat_map

    for number, model in enumerate(models):
        for kind in DEPTH_KINDS:
            mine = [row for row in rows if row["model"] == model.name and row["kind"] == kind]
            if not mine:
                continue
            lengths = sorted({row["length"] for row in mine})
            depths = sorted({row["depth"] for row in mine})
            share = {(row["depth"], row["length"]): row["accuracy"] for row in mine}
            beyond = {row["length"] for row in mine if row["beyond training"]}
            write_heat_map(
                folder / f"retrieval-{kind}-{file_word(number, model)}.svg",
                [[share[depth, length] for length in lengths] for depth in depths],
                rows=[f"{depth:.0%}" for depth in depths],
                columns=[length_name(length) + "*" * (length in beyond) for length in lengths],
                x="tokens of context" + (f" (* beyond the {model.training_length:,} of training)" if beyond else ""),
                y="depth of the value",
                title=f"{kind}: {model.name}",
            )
    by_length = [
        Curve(f"{kind}, {model.name}", *mean_by(rows, model.name, kind, "length"), "o-")
        for model in models
        for kind in KINDS
        if any(row["kind"] == kind for row in rows)
    ]
    marks = training_marks(models)
    write_curves(
        folder / "retrieval.svg", by_length, x="tokens of context", y="share found", log_x=True, marks=marks,
        y_range=SHARES,
    )  # fmt: skip
    by_pairs = [
        Curve(f"{length_name(length)} tokens, {model.name}", *mean_by(some, model.name, RECALL, "pairs"), "o-")
        for model in models
        for length in sorted({row["length"] for row in rows})
        if (some := [row for row in rows if row["length"] == length and row["kind"] == RECALL])
    ]
    if by_pairs:
        write_curves(
            folder / "retrieval-recall.svg",
            by_pairs,
            x="pairs in the text",
            y="share found",
            log_x=True,
            y_range=SHARES,
        )


def file_word(number: int, model: TextModel) -> str:
    """A model in a file's name: its place among the models and the last part of its path."""
    return f"{number + 1}-" + re.sub(r"[^\w.-]+", "-", model.path.name or model.path.resolve().name)


def mean_by(rows: list[Row], model: str, kind: str, column: str) -> tuple[list[float], list[float]]:
    """The values of a column, and for each the share found in all of its rows."""
    mine = [row for row in rows if row["model"] == model and row["kind"] == kind]
    at = sorted({row[column] for row in mine})
    found = [sum(row["found"] for row in mine if row[column] == value) for value in at]
    asked = [sum(row["asked"] for row in mine if row[column] == value) for value in at]
    return at, [f / a for f, a in zip(found, asked, strict=True)]


def training_marks(models: Sequence[TextModel]) -> dict[str, float]:
    """The training lengths as marks of a picture: one line each, named where they differ."""
    lengths = {model.training_length for model in models if model.training_length is not None}
    return {f"training length {length:,}": length for length in sorted(lengths)}


if __name__ == "__main__":
    sys.exit(main())
