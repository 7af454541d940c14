"""Drop documents that are equal, token for token and in what of them is learned, to an earlier one. Exact: documents of
equal hash are compared."""

import argparse
import os
from hashlib import blake2b

import numpy as np

from data_prep import manifest
from data_prep.shards import DocumentSource, ShardWriter, refuse_existing
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", help="path of the pair without .bin, of its shards without -00000, or a glob")
    parser.add_argument("--output", required=True, help="prefix of the result")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> None:
    """Eight bytes of memory a document."""
    source = DocumentSource(args.prefix)
    reader = source.reader
    refuse_existing(args.output, args.overwrite)
    if os.path.abspath(args.output) in map(os.path.abspath, [args.prefix, *source.pairs]):
        raise UserError("--output must differ from the input")
    kept = np.flatnonzero(~repeated(reader, source.mask))
    with ShardWriter(args.output, reader.dtype, source.mask is not None) as writer, source:
        gaps = np.flatnonzero(np.diff(kept) != 1) + 1
        for run_ in np.split(kept, gaps) if len(kept) else []:
            writer.take_documents(source, int(run_[0]), int(run_[-1]) + 1)
        writer.finish()
    manifest.carry_over([args.prefix], writer.about())
    print(
        f"{args.output}: {writer.documents} documents, {writer.tokens} tokens; dropped"
        f" {reader.n_documents - writer.documents} documents, {reader.n_tokens - writer.tokens} tokens"
    )


def repeated(reader: IndexedReader, mask: IndexedReader | None = None) -> np.ndarray:
    """bool [n_documents]: whether an earlier document, and its mask, is the same."""

    def content(index: int) -> bytes:
        return reader.document(index).tobytes() + (mask.document(index).tobytes() if mask else b"")

    digests = np.empty(reader.n_documents, np.uint64)
    for index in range(reader.n_documents):
        digest = blake2b(content(index), digest_size=8).digest()
        digests[index] = int.from_bytes(digest, "little")
    order = np.argsort(digests, kind="stable")
    out = np.zeros(reader.n_documents, bool)
    same = digests[order[1:]] == digests[order[:-1]] if len(order) > 1 else np.zeros(0, bool)
    group: list[int] = []
    for at in np.flatnonzero(same).tolist():  # pairs of neighbours with equal hash
        earlier, later = int(order[at]), int(order[at + 1])
        if not group or group[-1] != earlier:
            group, originals = [earlier], [earlier]
        group.append(later)
        if content(later) in map(content, originals):
            out[later] = True
        else:
            originals.append(later)
    return out
