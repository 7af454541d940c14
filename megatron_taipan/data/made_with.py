"""Which tokenizer a pair was made with, according to its manifest.

`data_prep tokenize` writes PREFIX.json, with an entry in `shards` for each pair that it describes, the hash of the
tokenizer, and the ids that begin and end each document. Ids of two tokenizers look alike, so only the manifest can
distinguish them. A pair without a manifest, such as Megatron's own, is accepted unchecked.
"""

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from megatron_taipan.data.manifests import manifest_of
from megatron_taipan.errors import UserError


def tokenizer_of(prefix: str) -> dict | None:
    """The tokenizer in the manifest of a pair (`name`, `sha256`, ...); None where there is none."""
    found = manifest_of(prefix).get("tokenizer")
    return found if isinstance(found, dict) and isinstance(found.get("sha256"), str) else None


def refuse_mixed(prefixes: Iterable[str]) -> None:
    """Raises UserError if two pairs were made with different tokenizers, as far as their manifests say."""
    first: tuple[str, dict] | None = None
    for prefix in prefixes:
        found = tokenizer_of(prefix)
        if found is None:
            continue
        if first is not None and found["sha256"] != first[1]["sha256"]:
            raise UserError(
                f"{prefix} was made with the tokenizer {_shown(found)} and {first[0]} with {_shown(first[1])}: the same"
                " id means another token in each; tokenize one of them again with the other's tokenizer"
            )
        first = first or (prefix, found)


def refuse_other(prefixes: Iterable[str], tokenizer: str | Path, where: str) -> None:
    """Raises UserError if a pair was made with another tokenizer than this file.

    A missing file is not compared, nor are pairs made with a tokenizer that is not a file (`tiktoken:NAME`).

    Args:
        where: the option that names the file.
    """
    if not os.path.isfile(tokenizer):
        return
    tokenizers = {prefix: found for prefix in prefixes if (found := tokenizer_of(prefix))}
    ours = sha256(Path(tokenizer).read_bytes()).hexdigest() if tokenizers else ""
    for prefix, found in tokenizers.items():
        if found["sha256"] != ours and not str(found.get("name")).startswith("tiktoken:"):
            raise UserError(
                f"{where}: {tokenizer} (sha256 {ours[:12]}) is not the tokenizer that {prefix} was made with,"
                f" {_shown(found)}; give that file"
            )


def added_ids(prefixes: Iterable[str]) -> dict[str, int]:
    """The ids that begin (`bos`) and end (`eod`) each document, where all manifests that name one name the same."""
    named: dict[str, set[int]] = {"bos": set(), "eod": set()}
    for prefix in prefixes:
        options = manifest_of(prefix).get("options")
        for role, ids in named.items():
            if isinstance(options, dict) and isinstance(options.get(role), int):
                ids.add(options[role])
    return {role: ids.pop() for role, ids in named.items() if len(ids) == 1}


def _shown(tokenizer: dict) -> str:
    return f"{tokenizer.get('name')} (sha256 {tokenizer['sha256'][:12]})"
