"""What the settings of another library say: each is taken over, known not to change a logit, or refused.

A setting that is quietly passed over is a model that computes something else. So each library has a table of all its
settings, and one that no table knows is refused too, unless it has the value that the library itself puts there (a new
release may write more of them; the comparison of the logits judges those).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_taipan.errors import UserError
from megatron_taipan.model_config import ModelConfig

Settings = dict[str, Any]

FREE_IN_TRANSFORMERS = frozenset({
    "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path",  # where it comes from
    "dtype", "torch_dtype",  # of the files; everything is read as float32
    "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class",  # of the text, not of the network
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "num_logits_to_keep",  # what is returned
    "id2label", "label2id", "num_labels", "problem_type",  # of classifiers
    "initializer_range",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",  # how, not what
})  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """The settings of one kind of source."""

    taken: frozenset[str]  # by the function that builds our network of them
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # values that mean what our layers compute
    free: frozenset[str] = frozenset()  # change no logit
    unread: Mapping[str, Any] = field(default_factory=dict)  # are in files but nothing reads them: what we compute


def judge(settings: Settings, defaults: Settings, rules: Rules) -> tuple[list[str], list[str]]:
    """What speaks against the source, and what the user should know.

    Args:
        settings: all of the source's, those that its file leaves out too; defaults: the library's own values.
    """
    faults, notes = [], []
    for name, value in settings.items():
        if name in rules.only:
            allowed = [plain(one) for one in rules.only[name]]
            if plain(value) not in allowed:
                faults.append(f"{name}={value!r} (this network computes {' or '.join(map(repr, rules.only[name]))})")
        elif name in rules.unread:
            if value != rules.unread[name]:
                notes.append(
                    f"config.json says {name}={value!r}; the source's library does not read it, and neither do we"
                )
        elif name not in rules.taken | rules.free and (name not in defaults or plain(defaults[name]) != plain(value)):
            faults.append(f"{name}={value!r} (an unknown setting; take it out of config.json if it changes nothing)")
    return faults, notes


def refuse(folder: Path, faults: list[str]) -> None:
    """
    Raises:
        UserError: there are any; it names them all.
    """
    if faults:
        raise UserError(f"{folder} is another network than its weights would be here: {'; '.join(faults)}")


def plain(value: Any) -> Any:
    """A value that compares: lists as tuples, what JSON cannot hold (`{"__float__": "Infinity"}`) as the number."""
    if isinstance(value, list | tuple):
        return tuple(plain(one) for one in value)
    if isinstance(value, dict):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: plain(v) for k, v in value.items()}
    return value


def build_network(folder: Path, target: ModelConfig, sizes: Settings) -> ModelConfig:
    """The source as one of our networks; options of layers that it does not have are the target's.

    Args:
        sizes: options of the model, `mamba` and `attention` as trees.

    Raises:
        UserError: the sizes contradict each other.
    """
    tree = target.model_dump()
    nested = {part: tree[part] | sizes[part] for part in ("mamba", "attention") if part in sizes}
    try:
        return ModelConfig.model_validate(tree | sizes | nested)
    except ValidationError as error:
        fault = error.errors()[0]
        place = "".join(f"{part}." for part in fault["loc"]).rstrip(".")
        raise UserError(f"{folder}/config.json: {place or 'its sizes'}: {fault['msg']}") from error
