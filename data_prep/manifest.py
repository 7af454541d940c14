"""PREFIX.json: what the shards were made from and what they hold."""

import os
import shutil
from pathlib import Path

import orjson
import xxhash

from data_prep.hashing import hash_file
from data_prep.job import Job
from megatron_taipan.data import loss_mask
from megatron_taipan.data.indexed import sync_and_close
from megatron_taipan.data.made_with import tokenizer_of
from megatron_taipan.data.manifests import NUMBER, manifest_of, refuse_foreign_names
from megatron_taipan.errors import UserError

# that are relied on; those inside may be absent or null
FIELDS: dict[str, type] = {"shards": list, "documents": int, "tokens": int, "tokenizer": dict, "options": dict}
INSIDE: dict[str, dict[str, type]] = {
    "tokenizer": {"vocab_size": int, "sha256": str},
    "options": {"bos": int, "eod": int},
}


def read(prefix: str) -> dict | None:
    """The manifest of a prefix, or None where there is none (or one of another format).

    Raises:
        UserError: it is damaged, or names files in another folder.
    """
    try:
        found = orjson.loads(Path(prefix + ".json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("format") != "data_prep manifest 1":
        return None
    for name, kind in FIELDS.items():
        if not isinstance(found.get(name), kind):
            raise UserError(f"{prefix}.json is damaged: its {name} is not {kind.__name__}; delete it, or make it again")
    for name, inside in INSIDE.items():
        for key, kind in inside.items():
            if found[name].get(key) is not None and not isinstance(found[name][key], kind):
                raise UserError(
                    f"{prefix}.json is damaged: its {name}.{key} is not {kind.__name__}; delete it, or make it again"
                )
    if not all(isinstance(shard, dict) and isinstance(shard.get("prefix"), str) for shard in found["shards"]):
        raise UserError(f"{prefix}.json is damaged: a shard has no prefix; delete it, or make it again")
    refuse_foreign_names(prefix, found)
    return found


def write(prefix: str, content: dict) -> None:
    """Writes it whole or not at all."""
    with open(prefix + ".json.partial", "wb") as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
        sync_and_close(file)
    os.replace(prefix + ".json.partial", prefix + ".json")


def present(prefix: str, content: dict) -> bool:
    """Whether the shards that a manifest names are there."""
    return all(os.path.exists(path + ending) for path in _paths(prefix, content) for ending in (".bin", ".idx"))


def remove(prefix: str) -> None:
    """Deletes the shards that the manifest names, then the manifest: killed in between, the next run knows them."""
    before = read(prefix) or {"shards": []}
    for path in _paths(prefix, before):
        for ending in (".idx", ".bin"):
            Path(path + ending).unlink(missing_ok=True)
    Path(prefix + ".json").unlink(missing_ok=True)


def forget(prefix: str) -> None:
    """Deletes the manifest of a pair whose content is about to be replaced by something that it does not describe; one
    that names other shards stays."""
    for name in {prefix, NUMBER.sub("", prefix)}:
        before = read(name) or {"shards": []}
        if any(shard["prefix"] == os.path.basename(prefix) for shard in before["shards"]):
            Path(name + ".json").unlink()


def carry_over(sources: list[str], about: dict) -> None:
    """Writes the manifest of a pair that holds documents of other pairs: the tokenizer, what it added to documents, the
    counts. Checksums it has none: the tokens were not read. Where a source has no manifest there is none.

    Args:
        about: prefix, documents and tokens of the pair, `loss_mask` (empty) if it has one.
    """
    known = [found for prefix in sources if (found := manifest_of(prefix)) and tokenizer_of(prefix)]
    if len(known) < len(sources):
        return
    prefix, name = about["prefix"], os.path.basename(about["prefix"])
    if os.path.exists(prefix + ".json"):
        print(f"{prefix}.json describes something else and is left as it is: {prefix} has no manifest")
        return
    options = [content.get("options") or {} for content in known]
    added = [content.get("added") for content in known]
    content = {
        "format": "data_prep manifest 1",
        "documents": about["documents"],
        "tokens": about["tokens"],
        "shards": [{**about, "prefix": name}],
        "tokenizer": known[0]["tokenizer"],
        "options": {
            **{role: _common([o.get(role) for o in options]) for role in ("bos", "eod")},
            "allow_special": any(o.get("allow_special") for o in options),
        },
        "made_from": sources,
    }
    if common := _common(added):
        content["added"] = common
    write(prefix, content)


def _common(values: list):
    """The value if all are the same, else None."""
    return values[0] if all(value == values[0] for value in values) else None


def _paths(prefix: str, content: dict) -> list[str]:
    """The pairs that a manifest names, masks among them."""
    pairs = []
    for shard in content["shards"]:
        pair = os.path.join(os.path.dirname(prefix), shard["prefix"])
        pairs += [pair, pair + loss_mask.SUFFIX] if "loss_mask" in shard else [pair]
    return pairs


def concatenate(paths: list[str], target: str) -> None:
    """Joins files into one, whole or not at all."""
    with open(target + ".partial", "wb") as out:
        for path in paths:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, out)
        sync_and_close(out)
    os.replace(target + ".partial", target)


def describe(
    job: Job, notes, shards, sizes, options, identity, tokenizer_name, added, problems, documents, tokens, text
) -> dict:
    """The content: inputs and tokenizer with hashes, options, counts and checksums per shard, what was left out."""
    hashes: dict[str, xxhash.xxh3_128] = {path: xxhash.xxh3_128() for path, _ in sizes}
    for unit, note in zip(job.units, notes, strict=True):
        for part, digest in zip(unit, note["input"], strict=True):
            hashes[part.path].update(bytes.fromhex(digest))
    learned = {name: sum(note[name] for note in notes) for name in ("learned", "apart")} if job.marked else {}
    return {
        "format": "data_prep manifest 1",
        "documents": documents,
        "tokens": tokens,
        **learned,  # tokens that the masks mark; documents with a border of what is learned within a token
        "text_bytes": text,
        "dtype": str(job.dtype),
        "shards": [_described(shard) for shard in shards],
        "skipped": {"total": sum(problems.values()), "reasons": dict(sorted(problems.items()))},
        "tokenizer": {
            "name": tokenizer_name,
            "sha256": job.tokenizer.digest,
            "library": job.tokenizer.library,
            "vocab_size": job.tokenizer.vocab_size,
        },
        "added": added,  # id and spelling of the tokens before and after each document, and who says that it is they
        "options": options,
        # xxh3-128 over the xxh3-128 digests of the slices in which a file was read
        "inputs": [{"path": path, "bytes": size, "hash": hashes[path].hexdigest()} for path, size in sizes],
        "identity": identity,
    }


def _described(shard: dict) -> dict:
    """What a joiner says of a shard, with the index's checksum and its mask's."""
    prefix = shard["prefix"]
    about = {**shard, "prefix": os.path.basename(prefix), "idx_xxh3_128": hash_file(prefix + ".idx")}
    if "loss_mask" in shard:
        about["loss_mask"] = shard["loss_mask"] | {"idx_xxh3_128": hash_file(prefix + loss_mask.SUFFIX + ".idx")}
    return about
