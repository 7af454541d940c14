"""Print documents of a .bin/.idx pair decoded with their special tokens visible and what is learned marked, and a
histogram of document lengths. Look here before training: a doubled or missing separator shows at once."""

import argparse
import itertools

import numpy as np

from data_prep.blocks import refuse_foreign
from data_prep.tokenizer_of_data import tokenizer_of_data
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.loss_mask import find_mask
from megatron_taipan.data.sources import open_reader
from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.base import Tokenizer

SHOWN = 40  # tokens at each end of a document
LEARNED = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}{}\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"  # around what is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", help="path of the pair without .bin, of its shards without -00000, or a glob")
    parser.add_argument("--tokenizer", help="what it was made with; without it ids are printed")
    parser.add_argument("--documents", type=int, default=3, help="how many to print (default: 3)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (default: 0)")
    parser.add_argument("--full", action="store_true", help=f"whole documents, not {SHOWN} tokens at each end")


def run(args: argparse.Namespace) -> None:
    """Prints counts, documents, histogram."""
    reader = open_reader(args.prefix)
    tokenizer = tokenizer_of_data(args.tokenizer, args.prefix) if args.tokenizer else None
    if args.first < 0 or (reader.n_documents and args.first >= reader.n_documents):
        raise UserError(f"--first {args.first}: {args.prefix} has documents 0 to {reader.n_documents - 1}")
    print(
        f"{args.prefix}: {reader.n_documents} documents, {reader.n_tokens} tokens of {reader.dtype},"
        f" fingerprint {reader.fingerprint}"
    )
    mask = find_mask(reader)
    if mask:
        print(f"with a loss mask: what is learned is in {LEARNED.format(' ')}")
    for index in range(args.first, min(args.first + args.documents, reader.n_documents)):
        ids = reader.document(index)
        if tokenizer:
            refuse_foreign(reader, reader.start(index), ids, tokenizer)
        learned = mask.document(index) if mask else np.zeros(len(ids), np.uint8)
        print(f"\ndocument {index}, {len(ids)} tokens" + (f", {np.count_nonzero(learned)} learned" if mask else ""))
        ends = (slice(None),) if args.full or len(ids) <= 2 * SHOWN else (slice(SHOWN), slice(-SHOWN, None))
        print("  " + "\n  ...\n  ".join(show(ids[end], tokenizer, learned[end]) for end in ends))
    print("\n" + histogram(reader))


def show(ids: np.ndarray, tokenizer: Tokenizer | None, learned: np.ndarray) -> str:
    """Ids as text on one line, or as numbers; `learned` is 0 or 1 for each."""
    borders = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    out, shown = [], 0
    for begin, end in itertools.pairwise(borders):
        if tokenizer is None:
            part = " ".join(map(str, ids[begin:end].tolist()))
        else:  # from the front each time: the first token of a text may lose its blank
            text = tokenizer.decode(ids[:end].tolist())
            part, shown = text[shown:].replace("\n", "\\n"), len(text)
        out.append(LEARNED.format(part) if len(ids) and learned[begin] else part)
    return (" " if tokenizer is None else "").join(out)


def histogram(reader: IndexedReader, width: int = 50) -> str:
    """Documents by length, in powers of two, as a picture."""
    counts = np.zeros(64, np.int64)
    shortest, longest = None, 0
    for lengths in reader.lengths():
        counts += np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=64)[:64]
        shortest = int(lengths.min()) if shortest is None else min(shortest, int(lengths.min()))
        longest = max(longest, int(lengths.max()))
    if not reader.n_documents:
        return "no documents"
    mean = reader.n_tokens / reader.n_documents
    lines = [f"tokens per document: shortest {shortest}, mean {mean:.1f}, longest {longest}"]
    used = np.flatnonzero(counts)
    for power in range(used[0], used[-1] + 1):
        low, high = (0, 0) if power == 0 else (1 << (power - 1), (1 << power) - 1)
        bar = "#" * round(width * counts[power] / counts.max()) or ("." if counts[power] else "")
        lines.append(f"{low:>12,} to {high:>12,}  {counts[power]:>10,}  {bar}")
    return "\n".join(lines)
