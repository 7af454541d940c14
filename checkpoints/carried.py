"""What an export takes over from the folder that it is made of: an earlier export, an import, a fine-tuned model.

A checkpoint names its tokenizer and data in its configuration; a folder has the files themselves, which may have been
changed since, for good reasons. So they are copied as they are.
"""

import shutil
from pathlib import Path
from typing import Any

from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import parse_json

TOKENIZER = "tokenizer.json"
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
CARD, GENERATION = "README.md", "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_carried_files(source: Path, folder: Path, *, tokenizer: bool) -> list[str]:
    """Copies what there is of the tokenizer (if wanted), the generation settings and the card; returns the names."""
    wanted = [*((TOKENIZER, *TOKENIZER_EXTRAS) if tokenizer else ()), GENERATION, CARD]
    there = [name for name in wanted if (source / name).is_file()]
    for name in there:
        shutil.copyfile(source / name, folder / name)
    return there


def read_json(path: Path) -> dict[str, Any]:
    """A file's settings; empty where the file does not exist.

    Raises:
        UserError: it holds something else.
    """
    try:
        said = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise UserError(f"{path} holds not settings but a {type(said).__name__}")
    return said


def special_of(source: Path) -> dict[str, str]:
    """The folder's special tokens by kind (`eos_token`, ...)."""
    said = read_json(source / "tokenizer_config.json")
    named = {kind: value.get("content") if isinstance(value, dict) else value for kind, value in said.items()}
    return {kind: value for kind, value in named.items() if kind.endswith("_token") and isinstance(value, str)}
