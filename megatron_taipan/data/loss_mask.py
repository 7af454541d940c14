"""The loss mask of a pair: which of its tokens are learned.

PREFIX_loss_mask.bin/.idx is a pair of the same format as PREFIX.bin/.idx, with documents of the same lengths and one
uint8 for each token: 1, the token is learned (as a label), or 0. Without a mask all tokens of a pair are learned. The
manifest that `data_prep tokenize` writes, PREFIX.json, has an entry `loss_mask` for each shard with a mask, so that a
lost mask does not turn into training on prompts.
"""

import os
import warnings

import numpy as np

from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.manifests import shard_entry
from megatron_taipan.data.shards import Shards
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError

SUFFIX = "_loss_mask"
DTYPE = np.dtype(np.uint8)


def attach_mask(reader: IndexedReader, wanted: str, data: DataConfig) -> None:
    """Sets `reader.loss_mask`, if the pair has a mask and `wanted` (DataSource.loss_mask) is not ignore.

    Raises:
        UserError: as `find_mask`; or no document fits into a sample of this configuration, so nothing would be learned.
    """
    reader.loss_mask = None if wanted == "ignore" else find_mask(reader, wanted == "require")
    if reader.loss_mask is None:
        return
    if data.one_document:
        raise UserError(
            f"{reader.prefix} has a loss mask and data.one_document=true cuts its documents: answers would lose their"
            " questions; set data.one_document=false, or loss_mask: ignore"
        )
    fit = sum(int(np.count_nonzero(lengths <= data.seq_len + 1)) for lengths in reader.lengths())
    if fit < reader.n_documents:
        longest = max(int(lengths.max()) for lengths in reader.lengths())
        message = (
            f"{reader.prefix}: {reader.n_documents - fit} of {reader.n_documents} documents have more than"
            f" data.seq_len + 1 = {data.seq_len + 1} tokens (the longest {longest}); their marked tokens are learned"
            " only in part or never"
        )
        if not fit:
            raise UserError(f"{message}; raise data.seq_len")
        warnings.warn(message, stacklevel=2)


def find_mask(reader: IndexedReader, required: bool = False) -> IndexedReader | None:
    """The mask beside a pair, or None where there is none.

    Raises:
        UserError: there is none, though it is required or the manifest names it; or it belongs to another pair.
    """
    if isinstance(reader, Shards):
        return _find_masks(reader, required)
    prefix = reader.prefix + SUFFIX
    if not any(os.path.exists(prefix + ending) for ending in (".bin", ".idx")):
        if required or "loss_mask" in shard_entry(reader.prefix)[1]:
            why = "loss_mask: require" if required else "its manifest names it"
            raise UserError(
                f"{prefix}.idx does not exist and {why}: copy the mask of {reader.prefix} here (two files), or"
                " tokenize again with a template that marks what is learned"
            )
        return None
    mask = IndexedReader(prefix)
    if mask.dtype != DTYPE:
        raise UserError(f"{prefix} holds {mask.dtype}, and a loss mask holds {DTYPE}; tokenize again")
    for name, ours, theirs in (
        ("documents", reader.n_documents, mask.n_documents),
        ("tokens", reader.n_tokens, mask.n_tokens),
    ):
        if ours != theirs:
            raise UserError(
                f"{prefix} has {theirs} {name} and {reader.prefix} has {ours}: it belongs to another pair; tokenize"
                " again"
            )
    at = 0
    for ours, theirs in zip(reader.lengths(), mask.lengths(), strict=True):
        if (wrong := ours != theirs).any():
            bad = int(wrong.argmax())
            raise UserError(
                f"{prefix}: document {at + bad} has {theirs[bad]} tokens and that of {reader.prefix} has {ours[bad]}:"
                " it belongs to another pair; tokenize again"
            )
        at += len(ours)
    return mask


def _find_masks(shards: Shards, required: bool) -> Shards | None:
    """The masks of all shards as one, or None where no shard has one."""
    masks = [find_mask(pair, required) for pair in shards.pairs]
    found = [mask for mask in masks if mask is not None]
    if not found:
        return None
    if len(found) < len(masks):
        bare = shards.pairs[masks.index(None)].prefix
        raise UserError(
            f"{bare} has no loss mask and {found[0].prefix} is beside another shard of {shards.prefix}: copy the"
            " missing mask here (two files), or name those with and without one as separate sources"
        )
    return Shards(shards.prefix + SUFFIX, found)


def check_mask(mask: IndexedReader, values: np.ndarray) -> None:
    """Refuses values other than 0 and 1."""
    if values.max(initial=0) > 1:
        raise UserError(f"{mask.prefix}.bin holds {values.max()}, and a loss mask holds only 0 and 1; tokenize again")
