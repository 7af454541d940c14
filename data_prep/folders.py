"""The files of a folder that are read, and what is passed over."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import orjson

from data_prep.kinds.registry import input_kind
from data_prep.packed import FORMS
from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import plain_name

# names of splits in names of files and folders, as Hugging Face datasets knows them, and what they mean
SPLIT_NAME = re.compile(
    r"(?:^|[-._ /\d])(train(?:ing)?|test(?:ing)?|eval(?:uation)?|val(?:id(?:ation)?)?|dev)(?=[-._ /\d]|$)"
)
MEANT = {"tr": "train", "te": "test", "ev": "test", "va": "validation", "de": "validation"}  # by their first letters

# beside data, not data: what Hugging Face's libraries write
DESCRIPTIONS = frozenset(
    "dataset_info.json dataset_infos.json dataset_dict.json state.json config.json generation_config.json"
    " tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json added_tokens.json".split()
)


def inside(folder: str, passed: dict[str, str]) -> list[str]:
    """Files of a known kind in a folder, to the bottom, through links to folders too. Nothing is passed over in
    silence: a folder that cannot be read is refused, a link to nothing is taken, to be reported by its reader, and what
    is not taken is in `passed`, each path with its `skipped_as`.

    Raises:
        UserError: a folder cannot be read, or holds several splits of a saved dataset.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read: {error.strerror}") from error

    found: list[str] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(str(Path(folder)), onerror=refuse, followlinks=True):
        folders.sort()  # of several ways to one folder always the same is taken
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # copies that tools keep for themselves, as .ipynb_checkpoints
        passed.update({os.path.join(place, name): f"folder {name}" for name in folders if name.startswith(".")})
        folders[:] = [name for name in folders if not name.startswith(".")]
        if "dataset_dict.json" in files:
            _refuse_splits(place, folders)
        data = _saved(place) if "state.json" in files else []
        taken = data or [name for name in files if is_data(name)]
        found += [path for name in taken if input_kind(path := os.path.join(place, name))]
        passed.update({os.path.join(place, name): skipped_as(name) for name in set(files) - set(taken)})
    return found


def is_data(name: str) -> bool:
    """Whether a file of a folder is taken for data."""
    return bool(input_kind(name)) and name not in DESCRIPTIONS and not name.startswith(".")


def skipped_as(name: str) -> str:
    """How a file that is passed over is called: by its ending, mostly."""
    if name in DESCRIPTIONS:
        return name
    stem, ending = os.path.splitext(name.lower())
    if ending in FORMS:
        ending = os.path.splitext(stem)[1] + ending
    return "hidden" if name.startswith(".") else ending or "without an ending"


def counted(kinds: Iterable[str]) -> str:
    """`3 .csv, 1 .md`: how many of each, most first."""
    counts = sorted(Counter(kinds).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {what}" for what, count in counts)


def print_passed_over(name: str, passed: Iterable[str], taken: list[str]) -> None:
    """Prints what of an input was passed over, and whether the names of what is taken are those of several splits."""
    if left := counted(passed):
        print(f"{name}: passed over {left}")
    if len(set(found := splits(taken))) > 1:
        print(f"{name}: several splits are read together, by their names: {counted(found)}; name one if not so")


def splits(paths: list[str]) -> list[str]:
    """The split of each file that has one in its name, below the folder that all have in common."""
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    named = (SPLIT_NAME.search(os.path.relpath(path, top).lower()) for path in paths)
    return [MEANT[match[1][:2]] for match in named if match]


def _refuse_splits(folder: str, folders: list[str]) -> None:
    """A DatasetDict that was saved: the caller must say which of its splits is meant."""
    counts = {name: len(_saved(os.path.join(folder, name))) for name in folders}
    counts = {name: count for name, count in counts.items() if count}
    if len(counts) > 1:
        held = ", ".join(f"{name} ({count} file(s))" for name, count in counts.items())
        raise UserError(
            f"{folder} holds several splits of a dataset: {held}; name those that are meant, as"
            f" {os.path.join(folder, next(iter(counts)))}"
        )


def _saved(folder: str) -> list[str]:
    """The files of a dataset that Hugging Face datasets saved: no others, since `map` leaves its results beside them,
    and all of them, since a missing one must be reported. Empty for any other folder.

    Raises:
        UserError: it names a file in another folder.
    """
    try:
        names = [entry["filename"] for entry in orjson.loads(Path(folder, "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    for name in names:
        if not plain_name(name):
            raise UserError(
                f"{os.path.join(folder, 'state.json')} names {str(name)[:200]!r} as one of its files, which is not a"
                " name of a file beside it; if you want that file, give it as an input"
            )
    return names
