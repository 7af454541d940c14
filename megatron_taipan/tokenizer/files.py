"""The file of a tokenizer by its name: a file, a folder, or a repository of the Hugging Face hub.

The configuration beside the file says which tokens begin and end a text, so it is fetched with it.
"""

import os
from pathlib import Path

from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.special_tokens import CONFIGS
from megatron_taipan.untrusted import parse_json

KNOWN = ("tokenizer.json", "tokenizer.model", "tiktoken.model")
EXPECTED = "a tokenizer.json, a sentencepiece or tiktoken .model file, or a folder or hub repository with one"


def tokenizer_file(name: str) -> str:
    """The file of a file, folder or hub name.

    Raises:
        UserError: there is none of a form that is read.
    """
    if os.path.isfile(name):
        return name
    if os.path.isdir(name):
        for inside in KNOWN:
            if os.path.isfile(os.path.join(name, inside)):
                return os.path.join(name, inside)
        raise UserError(f"folder {name} holds none of {', '.join(KNOWN)}{_instead(name, os.listdir(name))}")
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"tokenizer {name} does not exist; give {EXPECTED}")
    return _from_hub(name)


def what_it_is(path: str) -> str:
    """Of a .json file that is not a tokenizer.json: what it is instead and what helps; empty where that is unknown."""
    try:
        content = parse_json(Path(path).read_bytes())
    except (OSError, ValueError):
        return ""
    if not isinstance(content, dict):
        return f"; give {EXPECTED}"
    folder = os.path.dirname(path) or "."
    if isinstance(content.get("vocab"), list) and "config" in content:
        return _instead(folder, ["tekken.json"])
    if content and all(isinstance(value, int) for value in content.values()):
        return _instead(folder, ["vocab.json", "merges.txt"])
    return f", but perhaps a file that lies beside one; give {EXPECTED}"


def _instead(folder: str, names: list[str]) -> str:
    """What to do with a folder that holds other forms."""
    if "tekken.json" in names:
        return (
            "; tekken.json, mistral_common's form, is not read: give the tokenizer.json of the same model, which its"
            " transformers version has"
        )
    if "vocab.json" in names and "merges.txt" in names:
        return (
            "; vocab.json and merges.txt alone do not say how text is cut into words. Make a tokenizer.json of them:"
            f" python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}')"
            f".save_pretrained('{folder}')\" (GPT2TokenizerFast in place of AutoTokenizer where no config.json or"
            " tokenizer_config.json lies there and the tokenizer is GPT-2's)"
        )
    return f"; give {EXPECTED}"


def _from_hub(name: str) -> str:
    """The tokenizer of a repository, with its configuration beside it, all of one commit."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"tokenizer {name} is not a file or folder, and the hub cannot be asked: the package huggingface_hub is"
            " missing"
        ) from error

    def fetched(file: str, commit: str | None) -> str | None:
        """A path in the cache; None where the repository has no such file."""
        try:
            return hf_hub_download(name, file, revision=commit)
        except LocalEntryNotFoundError:  # neither in the cache nor within reach: nobody knows whether there is one
            raise
        except EntryNotFoundError:
            return None

    try:
        found = next((path for file in KNOWN if (path := fetched(file, None))), None)
    except Exception as error:  # the library raises its own and those of its transport
        raise UserError(
            f"tokenizer {name} is not a file or folder, and the hub does not give it:"
            f" {' '.join(str(error).split())[:200]}"
        ) from error
    if found is None:
        raise UserError(
            f"repository {name} holds none of {', '.join(KNOWN)} (tekken.json, and vocab.json with merges.txt, are not"
            f" read); give {EXPECTED}"
        )
    commit = Path(found).parent.name
    for config in CONFIGS:
        try:
            fetched(config, commit)
        except Exception as error:
            if config == CONFIGS[0]:
                raise UserError(
                    f"tokenizer {name}: the hub does not give {config}, which says which tokens begin and end a text:"
                    f" {' '.join(str(error).split())[:200]}; run once with a connection, or download the repository and"
                    " give its folder"
                ) from error
    return found
