"""Put several .bin/.idx pairs into one, in natural order (part_2 before part_10), without reading the tokens."""

import argparse
import glob
import os

from data_prep import manifest
from data_prep.inputs import named_twice
from data_prep.shards import DocumentSource, ShardWriter, refuse_existing
from megatron_taipan.data.made_with import refuse_mixed
from megatron_taipan.data.sources import find_pairs, glob_pairs
from megatron_taipan.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prefixes",
        nargs="+",
        help="pairs, in this order; PREFIX of an output in shards gives its own, a glob or folder in natural order",
    )
    parser.add_argument("--output", required=True, help="prefix of the result")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> None:
    """Copies the .bin files and writes one index."""
    prefixes = expand_prefixes(args.prefixes)
    refuse_existing(args.output, args.overwrite)
    if os.path.abspath(args.output) in map(os.path.abspath, prefixes):
        raise UserError(f"{args.output} is one of the inputs; choose another --output")
    sources = [DocumentSource(prefix) for prefix in prefixes]
    first = sources[0]
    for source in sources:
        if source.reader.dtype != first.reader.dtype:
            raise UserError(
                f"{source.reader.prefix} holds {source.reader.dtype} and {first.reader.prefix} {first.reader.dtype};"
                " they were made with tokenizers of different size and cannot be in one file"
            )
        if (source.mask is None) != (first.mask is None):
            raise UserError(
                f"one of {first.reader.prefix} and {source.reader.prefix} has a loss mask and the other none; merge"
                " such pairs apart and name both in data.train"
            )
    refuse_mixed(prefixes)
    with ShardWriter(args.output, first.reader.dtype, first.mask is not None) as writer:
        for source in sources:
            with source:
                writer.take_documents(source, 0, source.reader.n_documents)
        writer.finish()
    manifest.carry_over(prefixes, writer.about())
    print(f"{args.output}: {writer.documents} documents, {writer.tokens} tokens from {len(sources)} pairs")


def expand_prefixes(names: list[str]) -> list[str]:
    """Prefixes of pairs by prefix, also of an output in shards, by a glob over prefixes, or all in a folder.

    Raises:
        UserError: something gives no pair, or one is named twice.
    """
    found: list[str] = []
    for name in names:
        if os.path.isdir(name):
            here = glob_pairs(os.path.join(glob.escape(name), "*"))
            if not here:
                raise UserError(f"{name} gives no .bin/.idx pair")
            found += here
        else:
            found += find_pairs(name.removesuffix(".idx").removesuffix(".bin"))
    if doubles := named_twice(found):
        raise UserError(f"{doubles[0]} is named twice; name it once")
    return found
