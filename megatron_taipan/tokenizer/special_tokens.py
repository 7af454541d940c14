"""Which token begins a document and which ends it, according to a tokenizer and the files beside it.

`tokenizer_config.json` and `special_tokens_map.json` (of transformers) name them, and null there means that there is
none. Where neither names one, the tokenizer itself may, then `generation_config.json` (ids); failing that, special
tokens of a usual spelling count. A token that the tokenizer does not mark as special never counts: it is an ordinary
token, which text may hold too, such as `<s>` in Qwen's vocabulary and `</s>`, a tag of HTML, in Gemma's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import parse_json

# Spellings that released tokenizers give to a role. Some have several of them, and only the configuration says which
# is right: Qwen's and Llama-3's base models end with another token than their chat models, with the same file.
USUAL_SPELLINGS = {
    "bos_token": (
        "<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<BOS_TOKEN>",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    ),
    "eos_token": (
        "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eot|>", "<|eot_id|>", "<|im_end|>", "<|return|>",
        "<EOS_TOKEN>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
}  # fmt: skip
END_TOKENS = {"bos": "bos_token", "eod": "eos_token"}  # the ends of a document in options and manifests of data_prep
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True)
class Role:
    """The tokens that may play a role, by id, with their spelling: none, one, or several where nothing decides.

    Attributes:
        said: what names the token; where there is none or more than one, why, as the middle of a sentence.
    """

    said: str
    candidates: dict[int, str] = field(default_factory=dict)

    @property
    def id(self) -> int | None:
        """The id, or None where there is none or more than one."""
        return next(iter(self.candidates)) if len(self.candidates) == 1 else None


def find_role(
    kind: str, path: Path | None, token_id: Callable[[str], int | None], special: dict[int, str], own: str | None = None
) -> Role:
    """The token of a role.

    Args:
        kind: a key of USUAL.
        path: the tokenizer's file, which has the configuration beside it; None where there is no file.
        token_id: the id of a token by its spelling.
        special: spelling of the tokens that the tokenizer marks as special, by id.
        own: spelling that the tokenizer's file itself gives the role.

    Raises:
        UserError: a configuration is not a JSON object.
    """
    configs = {name: _read(path.with_name(name)) for name in CONFIGS} if path else {}
    first, second, generation = (configs.get(name, {}) for name in CONFIGS)
    if kind in first and first[kind] is None:
        return Role(f"{CONFIGS[0]} says null: there is none")
    if kind in second and second[kind] is None and kind not in first:
        return Role(f"{CONFIGS[1]} says null: there is none")
    said = (CONFIGS[0], _spelling(first.get(kind))), (CONFIGS[1], _spelling(second.get(kind))), ("the tokenizer", own)
    voices = {name: spelling for name, spelling in said if spelling}
    if voices:
        return _agreed(voices, token_id, special)
    ids = generation.get(f"{kind}_id")
    listed = {i: special[i] for i in (ids if isinstance(ids, list) else [ids]) if i in special}
    if listed:
        return Role(CONFIGS[2] if len(listed) == 1 else f"{CONFIGS[2]} lists {_shown(listed)}", listed)
    usual = {i: spelling for i, spelling in special.items() if spelling in USUAL_SPELLINGS[kind]}
    if len(usual) > 1:
        return Role(f"nothing says which of {_shown(usual)} it is", usual)
    if usual:
        return Role("a special token of a usual name", usual)
    return Role("no configuration names one, and no special token has a usual name for it")


def _agreed(voices: dict[str, str], token_id: Callable[[str], int | None], special: dict[int, str]) -> Role:
    """The one token that all of `voices` name, a spelling by what names it."""
    found: dict[int, str] = {}
    for name, spelling in voices.items():
        index = token_id(spelling)
        if index is None:
            return Role(f"{name} names {spelling!r}, and the tokenizer has no such token")
        if index not in special:
            return Role(f"{name} names {spelling!r}, id {index}, an ordinary token, which text may hold too")
        found[index] = spelling
    if len(found) > 1:
        return Role("; ".join(f"{name} names {spelling!r}" for name, spelling in voices.items()), found)
    return Role(next(iter(voices)), found)


def _shown(tokens: dict[int, str]) -> str:
    """Spellings and ids, for a message."""
    return " and ".join(f"{spelling!r} (id {index})" for index, spelling in sorted(tokens.items()))


def _spelling(said: object) -> str | None:
    """The spelling of a token in a configuration, where it may be an object with the spelling as `content`."""
    said = said.get("content") if isinstance(said, dict) else said
    return said if isinstance(said, str) else None


def _read(path: Path) -> dict:
    """A configuration, empty where there is none."""
    try:
        found = parse_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; repair it, it says which tokens begin and end a text"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; repair it, it says which tokens begin and end a text")
    return found
