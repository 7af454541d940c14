"""Which pairs the name of a source means: one pair, the shards of one output, or what a glob finds."""

import glob
import os
import re

from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.loss_mask import SUFFIX
from megatron_taipan.data.manifests import NUMBER, named_shards
from megatron_taipan.data.shards import Shards
from megatron_taipan.errors import UserError


def open_reader(name: str) -> IndexedReader:
    """All pairs of a source as one reader.

    Raises:
        UserError: as `find_pairs` and `IndexedReader`.
    """
    pairs = find_pairs(name)
    return IndexedReader(pairs[0]) if len(pairs) == 1 else Shards(name, [IndexedReader(pair) for pair in pairs])


def find_pairs(name: str) -> list[str]:
    """Prefixes of the pairs of a source, in order.

    Args:
        name: PREFIX of a pair; PREFIX of an output in shards (PREFIX-00000, ...); or a glob over prefixes, which gives
            its pairs in natural order, loss masks left out.

    Raises:
        UserError: a glob finds nothing, a shard is missing, or there is one that the manifest does not name.
    """
    if any(os.path.exists(name + ending) for ending in (".idx", ".bin")):
        return [name]
    if glob.has_magic(name):
        found = glob_pairs(name)
        if not found:
            raise UserError(f"{name} matches no .bin/.idx pair")
        return found
    here = [pair for pair in glob_pairs(glob.escape(name) + "-*") if NUMBER.fullmatch(pair[len(name) :])]
    named = named_shards(name)
    if named == [name]:
        return named
    wanted = named or [f"{name}-{number:05d}" for number in range(len(here))]
    for pair in wanted:
        if pair not in here:
            why = "its manifest names" if named else "there are"
            raise UserError(
                f"{name} is in shards and {pair}.idx does not exist, though {why} {len(wanted)} of them: copy it here,"
                " or make them again"
            )
    if more := [pair for pair in here if pair not in wanted]:
        raise UserError(
            f"{more[0]} is beside the {len(wanted)} shards that {name}.json names: move it away, or name the shards"
            f" by a glob, '{name}-*'"
        )
    return wanted or [name]


def has_index(name: str) -> bool:
    """Whether all pairs of a source have an index."""
    try:
        return all(os.path.isfile(pair + ".idx") for pair in find_pairs(name))
    except UserError:
        return False


def glob_pairs(pattern: str) -> list[str]:
    """Pairs of a glob over prefixes in natural order, without loss masks, which are read with their pairs."""
    found = [path[:-4] for path in glob.glob(pattern.removesuffix(".idx") + ".idx")]
    return sorted((prefix for prefix in found if not prefix.endswith(SUFFIX)), key=natural)


def natural(path: str) -> list:
    """Sort key that puts part_2 before part_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]
