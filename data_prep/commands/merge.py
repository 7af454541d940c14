"""Put several .bin/.idx pairs into one, in natural order (part_2 before part_10), without reading the tokens."""

import argparse
import glob
import os

from data_prep.inputs import named_twice, natural
from data_prep.shards import ShardWriter, refuse_existing
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prefixes", nargs="+", help="pairs, in this order; a glob or folder gives its own in natural order"
    )
    parser.add_argument("--output", required=True, help="prefix of the result")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> None:
    """Copies the .bin files and writes one index."""
    prefixes = expand_prefixes(args.prefixes)
    refuse_existing(args.output, args.overwrite)
    if args.output in prefixes:
        raise UserError(f"{args.output} is one of the inputs; choose another --output")
    readers = [IndexedReader(prefix) for prefix in prefixes]
    for reader in readers:
        if reader.dtype != readers[0].dtype:
            raise UserError(
                f"{reader.prefix} holds {reader.dtype} and {readers[0].prefix} {readers[0].dtype}; they were made with"
                " tokenizers of different size and cannot stand in one file"
            )
    with ShardWriter(args.output, readers[0].dtype) as writer:
        for reader in readers:
            with open(reader.prefix + ".bin", "rb") as source:
                writer.take_documents(reader, source, 0, reader.n_documents)
        writer.finish()
    print(f"{args.output}: {writer.documents} documents, {writer.tokens} tokens from {len(readers)} pairs")


def expand_prefixes(names: list[str]) -> list[str]:
    """Prefixes of pairs by prefix, by a glob over prefixes, or all in a folder.

    Raises:
        UserError: something gives no pair, or one is named twice.
    """
    found: list[str] = []
    for name in names:
        if os.path.isdir(name):
            here = [path[:-4] for path in glob.glob(os.path.join(glob.escape(name), "*.idx"))]
        elif glob.has_magic(name):
            here = [path[:-4] for path in glob.glob(name.removesuffix(".idx") + ".idx")]
        else:
            here = [name.removesuffix(".idx").removesuffix(".bin")]
        if not here:
            raise UserError(f"{name} gives no .bin/.idx pair")
        found += sorted(here, key=natural)
    if doubles := named_twice(found):
        raise UserError(f"{doubles[0]} is named twice; name it once")
    return found
