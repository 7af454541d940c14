"""With which tokenizer a pair was made: what its manifest says.

`data_prep tokenize` writes PREFIX.json, with an entry in `shards` for each pair that it describes, the hash of the
tokenizer, and the ids that begin and end each document. Ids of two tokenizers look alike, so nothing but this tells
them apart. A pair without a manifest, as Megatron's own are, is taken as it is.
"""

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from megatron_taipan.data.manifests import described
from megatron_taipan.errors import UserError


def tokenizer_of(prefix: str) -> dict | None:
    """What the manifest of a pair says of the tokenizer (`name`, `sha256`, ...); None where there is none."""
    told = described(prefix).get("tokenizer")
    return told if isinstance(told, dict) and isinstance(told.get("sha256"), str) else None


def refuse_mixed(prefixes: Iterable[str]) -> None:
    """Raises UserError if two pairs were made with different tokenizers, as far as manifests say."""
    first: tuple[str, dict] | None = None
    for prefix in prefixes:
        told = tokenizer_of(prefix)
        if told is None:
            continue
        if first is not None and told["sha256"] != first[1]["sha256"]:
            raise UserError(
                f"{prefix} was made with the tokenizer {_shown(told)} and {first[0]} with {_shown(first[1])}: the same"
                " id means another token in each; tokenize one of them again with the other's tokenizer"
            )
        first = first or (prefix, told)


def refuse_other(prefixes: Iterable[str], tokenizer: str | Path, where: str) -> None:
    """Raises UserError if a pair was made with another tokenizer than this file.

    A file that is missing is not compared, nor are pairs made with one that is no file (`tiktoken:NAME`).

    Args:
        where: the option that names the file.
    """
    if not os.path.isfile(tokenizer):
        return
    told = {prefix: found for prefix in prefixes if (found := tokenizer_of(prefix))}
    ours = sha256(Path(tokenizer).read_bytes()).hexdigest() if told else ""
    for prefix, found in told.items():
        if found["sha256"] != ours and not str(found.get("name")).startswith("tiktoken:"):
            raise UserError(
                f"{where}: {tokenizer} (sha256 {ours[:12]}) is not the tokenizer that {prefix} was made with,"
                f" {_shown(found)}; give that file"
            )


def added_ids(prefixes: Iterable[str]) -> dict[str, int]:
    """The ids that begin (`bos`) and end (`eod`) each document, where manifests tell of one and of no other."""
    told: dict[str, set[int]] = {"bos": set(), "eod": set()}
    for prefix in prefixes:
        options = described(prefix).get("options")
        for role, ids in told.items():
            if isinstance(options, dict) and isinstance(options.get(role), int):
                ids.add(options[role])
    return {role: ids.pop() for role, ids in told.items() if len(ids) == 1}


def _shown(told: dict) -> str:
    return f"{told.get('name')} (sha256 {told['sha256'][:12]})"
