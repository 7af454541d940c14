"""The manifest PREFIX.json of `data_prep tokenize` and the pairs that it names."""

import os
import re
from pathlib import Path

from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import parse_json, plain_name

NUMBER = re.compile(r"-\d{5,}$")  # what `tokenize --shard-tokens` and `split --shard-tokens` append to PREFIX


def named_shards(prefix: str) -> list[str]:
    """The pairs that the manifest of an output names; empty where there is none, or none of ours."""
    folder = prefix[: len(prefix) - len(os.path.basename(prefix))]
    return [folder + shard["prefix"] for shard in _read(prefix).get("shards", [])]


def shard_entry(prefix: str) -> tuple[str, dict]:
    """The manifest of a pair, or of the shards of which it is one, and its entry there; empty where there is none."""
    for name in (prefix, NUMBER.sub("", prefix)):
        for shard in _read(name).get("shards", []):
            if shard["prefix"] == os.path.basename(prefix):
                return name + ".json", shard
    return prefix + ".json", {}


def manifest_of(prefix: str) -> dict:
    """The manifest that describes a pair, the shards of which it is one, or an output in shards; else empty."""
    path, entry = shard_entry(prefix)
    content = _read(path.removesuffix(".json"))
    whole = all(shard["prefix"].startswith(os.path.basename(prefix)) for shard in content.get("shards", []))
    return content if entry or whole else {}


def _read(prefix: str) -> dict:
    try:
        content = parse_json(Path(prefix + ".json").read_bytes())
        if not all(isinstance(shard["prefix"], str) for shard in content["shards"]):
            return {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none, or none of ours
    refuse_foreign_names(prefix, content)
    return content


def refuse_foreign_names(prefix: str, content: dict) -> None:
    """Raises UserError if a manifest, which has shards with prefixes, names a pair in another folder: following it
    would read or delete files that do not belong to it."""
    for shard in content["shards"]:
        if not plain_name(shard["prefix"]):
            raise UserError(
                f"{prefix}.json names the pair {shard['prefix'][:200]!r}, but a manifest names only pairs beside it: it"
                " was not written by data_prep; delete it, or make the data again"
            )
        if not isinstance(shard.get("loss_mask", {}), dict):
            raise UserError(f"{prefix}.json is damaged: loss_mask of {shard['prefix']} holds no checksums")
