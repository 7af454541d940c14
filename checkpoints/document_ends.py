"""Which tokens surround each document of a run's training data: what an exported tokenizer puts around a text.

`python -m data_prep tokenize` notes them in the manifest PREFIX.json (options `bos` and `eod`); of pairs without one,
which were merged or come from elsewhere, the documents themselves are looked at.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from data_prep import manifest
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data_config import DataConfig

LOOKED_AT = 200  # documents of a pair without manifest


@dataclass(frozen=True)
class DocumentEnds:
    """Ids before the first and after the last token of every document's text; None: there is no such token."""

    begin: int | None
    end: int | None


def document_ends(data: DataConfig, bos: int | None, eos: int | None) -> DocumentEnds | None:
    """What all training data agrees on; None where neither manifest nor data of some source is left.

    Sources that disagree on a token count as having none: a model that saw texts without it needs none.

    Args:
        bos, eos: the tokenizer's own, looked for where there is no manifest.
    """
    found = {_of_manifest(source.prefix) or _of_documents(source.prefix, bos, eos) for source in data.train}
    known = [ends for ends in found if ends is not None]
    if None in found:
        return None
    begins, ends = {each.begin for each in known}, {each.end for each in known}
    return DocumentEnds(begins.pop() if len(begins) == 1 else None, ends.pop() if len(ends) == 1 else None)


def _of_manifest(prefix: str) -> DocumentEnds | None:
    """What the manifest of a pair, or of an output in shards, says: its own, or one in the same folder that names it as
    a shard."""
    folder = Path(prefix).parent
    beside = [path.with_suffix("") for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    for place in dict.fromkeys([prefix, *map(str, beside)]):
        said = manifest.read(place)
        name = os.path.basename(prefix)
        own = place == prefix and said is not None and all(s["prefix"].startswith(name) for s in said["shards"])
        if said is not None and (own or any(shard["prefix"] == name for shard in said["shards"])):
            options = said["options"]
            return DocumentEnds(options.get("bos"), options.get("eod"))
    return None


def _of_documents(prefix: str, bos: int | None, eos: int | None) -> DocumentEnds | None:
    """What documents spread over a pair have in common; None where there is no pair, or nothing in it."""
    if not Path(f"{prefix}.idx").is_file():
        return None
    reader = IndexedReader(prefix)
    step = max(1, reader.n_documents // LOOKED_AT)
    documents = [reader.document(index) for index in range(0, reader.n_documents, step)]
    first = {int(ids[0]) for ids in documents if len(ids)}
    last = {int(ids[-1]) for ids in documents if len(ids)}
    return DocumentEnds(bos if first == {bos} else None, eos if last == {eos} else None) if first else None
