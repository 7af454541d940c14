"""What `perplexity --lengths` does: perplexity of contexts of several lengths, and loss by position in the longest.

A sample is the beginning or middle of one document where the data has one that is longer than the context; else
documents in a row, which see each other and count as one context. Rows are read in chunks through the decoding cache,
so that memory does not grow with the length where the layers' states do not. Several ranks read a consecutive piece of
each row instead, in one pass without a cache.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_taipan.data.batch import Batch
from megatron_taipan.data.loader import SampleDataset, build_dataset
from megatron_taipan.data.piece import RowPiece
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.chunked import losses_in_chunks, losses_of_piece
from megatron_taipan.evaluation.fits import lacks_memory, new_peak, peak_bytes
from megatron_taipan.evaluation.lengths import length_name, parse_length, parse_lengths
from megatron_taipan.evaluation.perplexity import Score, data_for, each_model, mean_score, name_data, read_batches
from megatron_taipan.evaluation.ranks import Ranks
from megatron_taipan.evaluation.results import Row, write_results
from megatron_taipan.model.taipan import Taipan

Split = Literal["train", "valid"]

KINDS = ("auto", "one", "row")  # of contexts: see `build_contexts`


@dataclass(frozen=True)
class LengthScore:
    """Cross entropies of contexts of one length, by position: part i is positions edges[i] to edges[i + 1] - 1."""

    edges: tuple[int, ...]  # [parts + 1], from 0 to the length
    nats: tuple[float, ...]  # [parts] summed cross entropy
    tokens: tuple[int, ...]  # [parts] scored

    @property
    def total(self) -> Score:
        """Over all positions."""
        return mean_score(sum(self.nats), sum(self.tokens))


def position_edges(first: int, length: int) -> tuple[int, ...]:
    """0, `first`, and its doubles below `length`, then `length`."""
    doubles = itertools.takewhile(lambda edge: edge < length, (first << k for k in itertools.count()))
    return (0, *doubles, length)


def score_contexts(
    model: Taipan, contexts: SampleDataset, *, samples: int, first: int, batch: int = 1, chunk: int = 2048,
    progress: tqdm | None = None,
) -> LengthScore:  # fmt: skip
    """Scores the first `samples` contexts (at most one epoch), all pieces of them where ranks hold one each.

    Args:
        first: positions of the first part of the result; each later part doubles the length.
        batch: rows at a time, and chunk: tokens of each a pass, of pieces those whose logits are made together; they
            change speed and memory, not results.
        progress: told of every token of the whole contexts.

    Raises:
        UserError: no token is scored.
    """
    edges = position_edges(first, contexts.seq_len)
    bounds = torch.tensor(edges[1:])
    nats = torch.zeros(len(bounds), dtype=torch.float64)
    counts = torch.zeros(len(bounds), dtype=torch.float64)
    for rows in read_batches(contexts, samples, batch):
        if model.place is None:
            scored = sums_in_chunks(model, rows, bounds, chunk)
        else:
            scored = sums_of_piece(model, rows, bounds, chunk)
        for of_parts, tokens, read in scored:
            nats += of_parts
            counts += tokens
            if progress is not None:
                progress.update(read)
    if model.place is not None:
        device = next(model.parameters()).device
        nats, counts = model.place.sum_pieces(torch.stack([nats, counts]).to(device)).cpu()
    mean_score(float(nats.sum()), int(counts.sum()))  # refuses a dataset without tokens to score
    return LengthScore(edges, tuple(nats.tolist()), tuple(int(n) for n in counts.tolist()))


Sums = Iterator[tuple[Tensor, Tensor, int]]  # nats and tokens scored, float64 [parts]; tokens of the contexts read


def sums_in_chunks(model: Taipan, rows: Batch, bounds: Tensor, chunk: int) -> Sums:
    """Of whole rows: of each chunk its sums by part of the positions, `bounds` [parts] being where these end."""
    for start, losses in losses_in_chunks(model, rows, chunk):
        stop = start + losses.shape[1]
        part = torch.bucketize(torch.arange(start, stop), bounds, right=True)  # [n]
        weight = rows["loss_mask"][:, start:stop].double()  # [b, n]
        nats = torch.bincount(part, (losses.double().cpu() * weight).sum(0), minlength=len(bounds))
        yield nats, torch.bincount(part, weight.sum(0), minlength=len(bounds)), losses.numel()


def sums_of_piece(model: Taipan, rows: Batch, bounds: Tensor, chunk: int) -> Sums:
    """The same of this rank's piece of each row, in one; no piece's losses are known before all pieces are read."""
    assert model.place is not None
    b, l = rows["tokens"].shape
    at = torch.arange(model.place.rank * l, (model.place.rank + 1) * l)  # positions in the row
    part = torch.bucketize(at, bounds, right=True)  # [l]
    columns = [some for k in range(len(bounds)) for some in (part == k).nonzero()[:, 0].split(chunk) if len(some)]
    starts = l * torch.arange(b)[:, None]
    sums = losses_of_piece(model, rows, [(starts + some).flatten() for some in columns])
    nats = torch.zeros(len(bounds), dtype=torch.float64)
    nats.index_add_(0, part[[int(some[0]) for some in columns]], sums)
    tokens = torch.bincount(part, rows["loss_mask"].double().sum(0), minlength=len(bounds))
    yield nats, tokens, b * l * model.place.size


def build_contexts(
    data: DataConfig, split: Split, length: int, kind: str, vocab_size: int, piece: RowPiece = RowPiece()
) -> tuple[SampleDataset, str]:
    """Samples of `length` tokens, and which they are in words.

    Args:
        kind: "one": each inside one document that is longer; "row": documents one after the other, which see each
            other; "auto": the first where the data has such documents.
        piece: which part of each context to read.

    Raises:
        UserError: the data has no such samples.
    """
    if kind != "row":
        # the same samples whatever the run's order of samples was
        one = data.model_copy(update={"seq_len": length, "one_document": True, "seed": 0})
        try:
            return build_dataset(one, split, vocab_size, piece), "one"
        except UserError:
            if kind == "one":
                raise
    row = data.model_copy(update={"seq_len": length, "one_document": False, "mask_documents": False, "seed": 0})
    return build_dataset(row, split, vocab_size, piece), "in a row"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What --lengths brings with it."""
    group = parser.add_argument_group("by length of the context")
    group.add_argument("--lengths", help="tokens of the contexts, such as 1K,4K,16K or 1K,4K,...,1M (K is 1024)")
    group.add_argument("--tokens", default="256K", help="tokens scored at each length at most, in whole contexts")
    group.add_argument(
        "--documents", choices=KINDS, default="auto",
        help="a context is inside one document, documents in a row that see each other, or one where there are such",
    )  # fmt: skip
    group.add_argument("--chunk", default="2K", help="tokens in each pass of one process; bounds its memory")
    group.add_argument("--training-length", help="tokens of a sample in training; default: as the model says")


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    """Scores every model at every length; prints, and writes what --out asks for.

    Raises:
        UserError: options or data do not fit, or no length could be scored.
    """
    lengths, budget, chunk = parse_lengths(options.lengths), parse_length(options.tokens), parse_length(options.chunk)
    given = parse_length(options.training_length) if options.training_length else None
    split: Split = "train" if options.data or options.split == "train" else "valid"
    about = {
        "data": name_data(options), "tokens at each length": budget,
        "chunk": chunk, "dtype": options.dtype, "device": options.device,
    }  # fmt: skip
    rows: list[Row] = []
    parts: list[Row] = []
    data: DataConfig | None = None
    print(
        f"{'model':<48} {'length':>8} {'perplexity':>12} {'cross entropy':>14} {'tokens':>10}  documents"
        "  (*: beyond training)"
    )
    for label, model, opened in each_model(options, options.untrained, ranks):
        if data is None:
            data = data_for(opened, options, options.seq_len or lengths[0])
        longest: LengthScore | None = None
        trained_on = given or opened.training_length
        for length in lengths:
            row: Row = {
                "model": label, "length": length, "perplexity": None, "cross entropy": None, "tokens": None,
                "contexts": None, "documents": None, "peak bytes": None,
                "training length": trained_on, "note": None,
            }  # fmt: skip
            try:
                vocabulary, piece = model.config.vocab_size, ranks.piece
                build = partial(build_contexts, data, split, length, options.documents, vocabulary, piece)
                contexts, kind = ranks.on_all(build)
            except UserError as error:
                if length == lengths[0]:  # at a longer one it may be that the data has no context of this length
                    raise
                row["note"] = str(error)
            else:
                count = min(options.samples, max(1, budget // length), len(contexts))
                row |= {"contexts": count, "documents": kind}
                device = next(model.parameters()).device
                new_peak(device)
                score = _score_if_it_fits(model, contexts, count, lengths[0], options.batch, chunk)
                row |= {"note": "out of memory"} if score is None else _numbers(score.total)
                row["peak bytes"] = peak_bytes(device)
                longest = score or longest
            rows.append(row)
            _print_row(row)
            if options.out is not None and ranks.size > 1:  # one of them may end all, at the next length
                ranks.on_first(partial(_write, options.out, rows, parts + _by_position(label, longest), about))
        parts += _by_position(label, longest)
    if options.out is not None:
        ranks.on_first(lambda: _write(options.out, rows, parts, about))


def _score_if_it_fits(
    model: Taipan, contexts: SampleDataset, count: int, first: int, batch: int, chunk: int
) -> LengthScore | None:
    """The scores, or None where memory does not suffice; with a progress bar.

    Raises:
        UserError: memory does not suffice on this rank; the others wait for it in a layer, and cannot go on.
    """
    length, place = contexts.seq_len, model.place
    bar = tqdm(
        total=count * length, desc=length_name(length), unit="tok", unit_scale=True, leave=False,
        disable=place is not None and place.rank > 0,
    )  # fmt: skip
    try:
        with bar:
            return score_contexts(
                model, contexts, samples=count, first=first, batch=min(batch, count), chunk=chunk, progress=bar
            )
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        if place is not None:
            raise UserError(
                f"rank {place.rank} lacks memory for {batch} x {length // place.size} tokens, its pieces of contexts of"
                f" {length_name(length)}; start more than {place.size} processes, or give --batch 1, --dtype bf16 or"
                " shorter --lengths"
            ) from error
        return None


def _numbers(score: Score) -> Row:
    return {"perplexity": score.perplexity, "cross entropy": score.ce, "tokens": score.tokens}


def _print_row(row: Row) -> None:
    length = length_name(row["length"]) + "*" * bool(row["training length"] and row["length"] > row["training length"])
    numbers = row["note"]
    if row["perplexity"] is not None:
        numbers = f"{row['perplexity']:>12.2f} {row['cross entropy']:>14.4f} {row['tokens']:>10,}  {row['documents']}"
    print(f"{row['model']:<48} {length:>8} {numbers}", flush=True)


def _by_position(label: str, score: LengthScore | None) -> list[Row]:
    """Rows of the longest contexts that were scored."""
    if score is None:
        return []
    return [
        {
            "model": label, "length": score.edges[-1], "from position": low, "below position": high,
            "cross entropy": nats / tokens if tokens else None, "tokens": tokens,
        }
        for (low, high), nats, tokens in zip(itertools.pairwise(score.edges), score.nats, score.tokens, strict=True)
    ]  # fmt: skip


def _write(folder: Path, rows: list[Row], parts: list[Row], about: dict) -> None:
    from megatron_taipan.evaluation.figures import curves_of, write_curves

    write_results(folder, "perplexity", rows, about=about, title="Perplexity by length of the context")
    marks = {f"training length {length_name(n)}": n for n in dict.fromkeys(r["training length"] for r in rows) if n}
    write_curves(
        folder / "perplexity.svg",
        curves_of(rows, "length", "perplexity"),
        x="tokens of context", y="perplexity", log_x=True, log_y=True, marks=marks,
    )  # fmt: skip
    if parts:
        title = "Loss by position in the longest contexts"
        write_results(folder, "perplexity_by_position", parts, about=about, title=title)
        write_curves(
            folder / "perplexity_by_position.svg",
            curves_of(parts, "below position", "cross entropy"),
            x="tokens of context, up to", y="cross entropy (nats a token)", log_x=True, marks=marks,
        )  # fmt: skip
