"""Print documents of a .bin/.idx pair decoded with their special tokens visible, and a histogram of document lengths.
Look here before training: a doubled or missing separator shows at once."""

import argparse

import numpy as np

from data_prep.tokenizers import Tokenizer, load_tokenizer, refuse_other_data
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError

SHOWN = 40  # tokens at each end of a document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", help="path of the pair without .bin")
    parser.add_argument("--tokenizer", help="what it was made with; without it ids are printed")
    parser.add_argument("--documents", type=int, default=3, help="how many to print (default: 3)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (default: 0)")
    parser.add_argument("--full", action="store_true", help=f"whole documents, not {SHOWN} tokens at each end")


def run(args: argparse.Namespace) -> None:
    """Prints counts, documents, histogram."""
    reader = IndexedReader(args.prefix)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if args.first < 0 or (reader.n_documents and args.first >= reader.n_documents):
        raise UserError(f"--first {args.first}: {args.prefix} has documents 0 to {reader.n_documents - 1}")
    print(
        f"{args.prefix}: {reader.n_documents} documents, {reader.n_tokens} tokens of {reader.dtype},"
        f" fingerprint {reader.fingerprint}"
    )
    for index in range(args.first, min(args.first + args.documents, reader.n_documents)):
        ids = reader.document(index)
        print(f"\ndocument {index}, {len(ids)} tokens")
        if args.full or len(ids) <= 2 * SHOWN:
            print("  " + show(ids, tokenizer))
        else:
            print(f"  {show(ids[:SHOWN], tokenizer)}\n  ...\n  {show(ids[-SHOWN:], tokenizer)}")
    print("\n" + histogram(reader))


def show(ids: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """Ids as text on one line, or as numbers."""
    if tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    refuse_other_data(int(ids.max(initial=0)), tokenizer)
    return tokenizer.decode(ids.tolist()).replace("\n", "\\n")


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
