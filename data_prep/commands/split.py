"""Cut a .bin/.idx pair: into shards of so many tokens, or into a training and a validation set by document."""

import argparse
import os
from contextlib import ExitStack

import numpy as np

from data_prep import manifest
from data_prep.shards import DocumentSource, ShardWriter, refuse_existing
from megatron_taipan.data.indexed import CHUNK
from megatron_taipan.data.split import held_out_documents
from megatron_taipan.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", help="path of the pair without .bin, of its shards without -00000, or a glob")
    parser.add_argument("--output", required=True, help="prefix of the results")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--shard-tokens", type=int, help="OUTPUT-00000, ... of at most this many tokens, documents whole")
    how.add_argument(
        "--valid-fraction", type=float, help="OUTPUT-train and OUTPUT-valid: the documents that training would hold out"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> None:
    """Writes the parts and prints what each holds."""
    with DocumentSource(args.prefix) as source, ExitStack() as stack:
        how = _shards if args.shard_tokens is not None else _by_document
        made = how(source, args, stack)
        for shard in made:  # all are on the disk: they get their names together
            shard.commit()
    for shard in made:
        manifest.carry_over([args.prefix], shard.about())
        print(f"{shard.prefix}: {shard.documents} documents, {shard.tokens} tokens")


def _shards(source: DocumentSource, args: argparse.Namespace, stack: ExitStack) -> list[ShardWriter]:
    reader = source.reader
    if args.shard_tokens < 1:
        raise UserError(f"--shard-tokens {args.shard_tokens}: at least 1 is needed")
    made: list[ShardWriter] = []
    first = 0
    while first < reader.n_documents or not made:
        prefix = f"{args.output}-{len(made):05d}"
        refuse_existing(prefix, args.overwrite)
        writer = stack.enter_context(ShardWriter(prefix, reader.dtype, source.mask is not None))
        last, room = first, args.shard_tokens
        while last < reader.n_documents:  # in pieces, so that memory does not grow with the corpus
            ends = reader.starts(np.arange(last, min(last + CHUNK, reader.n_documents) + 1))
            fits = int(np.searchsorted(ends - ends[0], room, "right")) - 1
            room -= int(ends[fits] - ends[0])
            last += fits
            if fits < len(ends) - 1:
                break
        last = max(last, min(first + 1, reader.n_documents))  # a document longer than a shard is alone in one
        writer.take_documents(source, first, last)
        writer.close()
        made.append(writer)
        first = last
    after = f"{args.output}-{len(made):05d}"
    if any(os.path.exists(after + ending) for ending in (".bin", ".idx")):
        raise UserError(f"{after} exists and would be beside {len(made)} new shards as if it were theirs; move it away")
    return made


def _by_document(source: DocumentSource, args: argparse.Namespace, stack: ExitStack) -> list[ShardWriter]:
    reader = source.reader
    if not 0 < args.valid_fraction < 1:
        raise UserError(f"--valid-fraction {args.valid_fraction}: it must be between 0 and 1")
    held = held_out_documents(reader, args.valid_fraction)
    for name in ("train", "valid"):
        refuse_existing(f"{args.output}-{name}", args.overwrite)
    train, valid = (
        stack.enter_context(ShardWriter(f"{args.output}-{name}", reader.dtype, source.mask is not None))
        for name in ("train", "valid")
    )
    at = 0
    for document in held.tolist():
        train.take_documents(source, at, document)
        valid.take_documents(source, document, document + 1)
        at = document + 1
    train.take_documents(source, at, reader.n_documents)
    train.close()
    valid.close()
    return [train, valid]
