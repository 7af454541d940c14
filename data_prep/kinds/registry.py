"""The kinds of input files by the endings of their names; one that is not here is an error, never another kind."""

import os

from data_prep.kinds.json_files import JSON, JSON_LINES
from data_prep.kinds.records import InputKind
from data_prep.kinds.tables import ARROW, PARQUET
from data_prep.kinds.text_files import TEXT_FILES
from data_prep.packed import FORMS, is_packed

INPUT_KINDS: dict[str, InputKind] = {}  # by ending; filled by `register_kind`


def register_kind(kind: InputKind) -> None:
    """Makes a kind known to all that reads inputs.

    Raises:
        ValueError: an ending of it is not one, or another kind has it.
    """
    for ending in kind.endings:
        if os.path.splitext("x" + ending)[1] != ending or ending != ending.lower() or ending in FORMS:
            raise ValueError(f"{ending!r} is not the ending of a kind: a dot and lower-case letters, not {list(FORMS)}")
        if INPUT_KINDS.get(ending, kind) is not kind:
            raise ValueError(f"{ending} is taken already: {INPUT_KINDS[ending].name}")
    INPUT_KINDS.update(dict.fromkeys(kind.endings, kind))


for _kind in (JSON_LINES, JSON, TEXT_FILES, PARQUET, ARROW):
    register_kind(_kind)


def input_kind(path: str) -> InputKind | None:
    """The kind of `.jsonl`, `.jsonl.gz`, `.txt.zst`, ...; None where the name says nothing that is read."""
    packed, path = is_packed(path), path.lower()
    kind = INPUT_KINDS.get(os.path.splitext(os.path.splitext(path)[0] if packed else path)[1])
    return kind if kind is not None and (kind.compressible or not packed) else None


def is_splittable(path: str) -> bool:
    """Whether a worker can start in the middle of a file."""
    kind = input_kind(path)
    return kind is not None and kind.splittable and not is_packed(path)


def known_endings() -> str:
    """Every ending, for messages."""
    compressible = (ending for ending, kind in INPUT_KINDS.items() if kind.compressible)
    return f"{', '.join(INPUT_KINDS)}; {', '.join(compressible)} also with {', '.join(FORMS)}"
