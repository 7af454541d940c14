"""Which files are read, by the endings of their names."""

import os

LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")  # a record a line; .json may also be one array, or one record
TEXTS = (".txt",)  # one document
TABLES = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
KINDS = LINES + TEXTS + TABLES
SPLITTABLE = LINES  # a worker can start in the middle of these, at the next line

# beside data, not data: what Hugging Face's libraries write
DESCRIPTIONS = frozenset(
    "dataset_info.json dataset_infos.json dataset_dict.json state.json config.json generation_config.json"
    " tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json added_tokens.json".split()
)


def kind_of(path: str) -> str | None:
    """`.jsonl`, `.jsonl.gz`, `.txt.zst`, ... or None where the name says nothing that we read."""
    stem, ending = os.path.splitext(path.lower())
    packed = ending if ending in COMPRESSED else ""
    kind = os.path.splitext(stem)[1] if packed else ending
    return kind + packed if kind in KINDS and not (packed and kind in TABLES) else None


def is_json(kind: str) -> bool:
    """Whether a kind may be one array or one record, and not lines."""
    return kind.split(".")[1] == "json"


def known_kinds() -> str:
    return f"{', '.join(KINDS)}; {', '.join(LINES + TEXTS)} also with {', '.join(COMPRESSED)}"
