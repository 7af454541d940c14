"""Numbers of a .bin/.idx pair: documents, tokens, learned ones, percentiles of length, the most frequent tokens, unused
ids."""

import argparse

import numpy as np

from data_prep import manifest
from data_prep.blocks import blocks, refuse_foreign
from data_prep.commands.inspect import histogram
from data_prep.commands.verify import count_learned
from data_prep.tokenizer_of_data import tokenizer_of_data
from megatron_taipan.data.loss_mask import find_mask
from megatron_taipan.data.sources import open_reader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", help="path of the pair without .bin, of its shards without -00000, or a glob")
    parser.add_argument("--tokenizer", help="shows tokens by their text")
    parser.add_argument("--top", type=int, default=20, help="most frequent tokens to list (default: 20)")


def run(args: argparse.Namespace) -> None:
    """Reads all tokens once."""
    reader = open_reader(args.prefix)
    tokenizer = tokenizer_of_data(args.tokenizer, args.prefix) if args.tokenizer else None
    counts = np.zeros(1, np.int64)
    for at, block in blocks(reader):
        refuse_foreign(reader, at, block, tokenizer)
        more = np.bincount(block)
        if len(more) > len(counts):
            counts = np.pad(counts, (0, len(more) - len(counts)))
        counts[: len(more)] += more
    print(f"{args.prefix}: {reader.n_documents} documents, {reader.n_tokens} tokens of {reader.dtype}")
    mask = find_mask(reader)
    if mask and reader.n_tokens:
        learned = count_learned(mask)
        print(f"loss mask: {learned} tokens are learned, {100 * learned / reader.n_tokens:.2f} %")
    said = manifest.read(args.prefix)
    if said and "text_bytes" in said and reader.n_tokens:
        print(f"{said['text_bytes']} bytes of text, {said['text_bytes'] / said['tokens']:.3f} bytes per token")
    if reader.n_documents:
        lengths = np.concatenate(list(reader.lengths()))
        shares = (1, 10, 25, 50, 75, 90, 99)
        found = np.percentile(lengths, shares, method="inverted_cdf")
        print(
            "tokens per document, percentiles: "
            + "  ".join(f"{s}%: {int(v)}" for s, v in zip(shares, found, strict=True))
        )
    used = int((counts > 0).sum())
    size = tokenizer.vocab_size if tokenizer else len(counts)
    print(f"{used} different ids of {size}; {size - used} never occur")
    for token in np.argsort(-counts, kind="stable")[: args.top]:
        if counts[token]:
            share = 100 * counts[token] / reader.n_tokens
            text = f"  {tokenizer.decode([int(token)])!r}" if tokenizer else ""
            print(f"  {int(token):>7}  {counts[token]:>12}  {share:5.2f} %{text}")
    print(histogram(reader))
