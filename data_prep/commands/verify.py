"""Read a .bin/.idx pair (or all shards of a manifest) again and check it: structure, checksums, ids, ends of documents,
loss mask; decode samples."""

import argparse
import os

import numpy as np

from data_prep import manifest
from data_prep.blocks import blocks
from data_prep.hashing import hash_file
from data_prep.tokenizer_of_data import refuse_other_data, tokenizer_of_data
from megatron_taipan.data.ids import refuse_outside
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.loss_mask import SUFFIX, check_mask, find_mask
from megatron_taipan.data.sources import find_pairs
from megatron_taipan.errors import UserError

SHOWN = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", help="path of the pair without .bin, or of the manifest without .json")
    parser.add_argument("--tokenizer", help="decode the beginnings of some documents with it")
    parser.add_argument("--vocab-size", type=int, help="ids must be below this (default: as the manifest says)")
    parser.add_argument("--samples", type=int, default=3, help="documents to decode (default: 3)")


def run(args: argparse.Namespace) -> None:
    """Checks everything, prints what was found, raises UserError at the first fault."""
    said = manifest.read(args.prefix)
    vocab_size = args.vocab_size or (said["tokenizer"].get("vocab_size") if said else None)
    options = said["options"] if said else {}
    eod = options.get("eod")
    tokenizer = tokenizer_of_data(args.tokenizer, args.prefix) if args.tokenizer else None
    if said and tokenizer and tokenizer.digest != said["tokenizer"].get("sha256"):
        raise UserError(
            f"{args.tokenizer} is not the tokenizer that {args.prefix} was made with ({said['tokenizer'].get('name')})"
        )
    folder = os.path.dirname(args.prefix)
    if said:
        shards = said["shards"]
    else:
        shards = [{"prefix": os.path.basename(pair)} for pair in find_pairs(args.prefix)]
    documents = tokens = learned = masks = 0
    for shard in shards:
        prefix = os.path.join(folder, shard["prefix"])
        reader = IndexedReader(prefix)
        for key, found in (("documents", reader.n_documents), ("tokens", reader.n_tokens)):
            if shard.get(key, found) != found:
                raise UserError(f"{prefix} holds {found} {key} and its manifest says {shard[key]}; make it again")
        mask = find_mask(reader)
        _checksums(prefix, shard)
        if mask is not None:
            _checksums(mask.prefix, shard.get("loss_mask", {}))
            learned += count_learned(mask)
            masks += 1
        top = _ids(reader, vocab_size)
        if eod is not None:
            # text may spell the token with --allow-special, and some tokenizers have one token for both ends
            _ends(reader, eod, inside=options.get("allow_special", False), first=options.get("bos") == eod)
        documents += reader.n_documents
        tokens += reader.n_tokens
        if tokenizer:
            refuse_other_data(top, tokenizer, f"{prefix}.bin: ")
        print(f"{prefix}: {reader.n_documents} documents, {reader.n_tokens} tokens of {reader.dtype}, largest id {top}")
        step = max(1, reader.n_documents // max(1, args.samples))
        for index in range(0, reader.n_documents, step)[: args.samples] if tokenizer else ():
            ids = reader.document(index)[:SHOWN].tolist()
            assert tokenizer is not None
            text = tokenizer.decode(ids)
            print(f"  document {index}: {text!r}")
    if said and (documents, tokens) != (said["documents"], said["tokens"]):
        raise UserError(
            f"the shards hold {documents} documents and {tokens} tokens, and the manifest says {said['documents']} and"
            f" {said['tokens']}"
        )
    if said and said.get("learned", learned) != learned:
        raise UserError(
            f"{args.prefix}: the loss masks mark {learned} tokens and the manifest says {said['learned']}; make it"
            " again"
        )
    if masks:
        print(f"{args.prefix}{SUFFIX}: {learned} of {tokens} tokens are learned")
    hashed = said is not None and all("bin_xxh3_128" in shard for shard in shards)
    without = " (no checksums in its manifest)" if said else " (no manifest: no checksums)"
    checked = "structure, ids" + (", checksums" if hashed else "") + (", counts" if said else "")
    checked += "" if hashed else without
    print(
        f"{args.prefix} is whole: {checked}{', ends of documents' if eod is not None else ''}"
        + (", loss mask" if masks else "")
    )


def _checksums(prefix: str, said: dict) -> None:
    """Compares a pair with what the manifest says of it."""
    for ending in (".bin", ".idx"):
        want = said.get(f"{ending[1:]}_xxh3_128")
        if want and (got := hash_file(prefix + ending)) != want:
            raise UserError(
                f"{prefix}{ending} has checksum {got} and its manifest says {want}: it is damaged; make it again"
            )


def count_learned(mask: IndexedReader) -> int:
    """How many tokens a mask marks; refuses one with other values than 0 and 1."""
    learned = 0
    for _, block in blocks(mask):
        check_mask(mask, block)
        learned += int(np.count_nonzero(block))
    return learned


def _ids(reader: IndexedReader, vocab_size: int | None) -> int:
    """The largest id, -1 where there is none; refuses one outside the vocabulary."""
    top = -1
    for at, block in blocks(reader):
        refuse_outside(reader, at, block, vocab_size or 1 << 63, "its vocabulary", "make it again")
        top = max(top, int(block.max()))
    return top


def _ends(reader: IndexedReader, eod: int, inside: bool, first: bool) -> None:
    """Every document must end with EOD, and EOD must be nowhere else, unless it may be `inside` or `first`."""
    document = 0
    for lengths in reader.lengths():
        for length in lengths.tolist():
            ids = reader.document(document)
            if not length or ids[-1] != eod:
                raise UserError(f"{reader.prefix}: document {document} does not end with the end-of-document id {eod}")
            if not inside and (ids[int(first) : -1] == eod).any():
                raise UserError(
                    f"{reader.prefix}: document {document} holds the end-of-document id {eod} before its end"
                )
            document += 1
