"""The files of an export besides weights and code: settings, tokenizer, card.

Of a checkpoint they follow from its configuration, its run's data and its log; of a folder they are what it holds.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints.carried import CARD, GENERATION, IDS, TOKENIZER, copy_carried_files, read_json, special_of
from checkpoints.model_card import describe_run, describe_tokenizer, model_card, with_dtype
from checkpoints.run_metrics import last_validation
from checkpoints.tokenizer import SPLIT, Special, refuse_larger, write_tokenizer
from megatron_taipan.checkpoint.calibration import read_capacity
from megatron_taipan.checkpoint.weights import CheckpointWeights, ExportedWeights
from megatron_taipan.inference.selection_watch import far_from_training
from megatron_taipan.inference.text import sample_texts
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.tokenizer.hf_tokenizer import HFTokenizer


@dataclass(frozen=True)
class Text:
    """What an exported folder must do with text."""

    tokenizer: Path | None = None  # the file whose ids it must give; None: it has no tokenizer
    samples: tuple[str, ...] = ()  # text of the training data
    special: Mapping[str, str] = field(default_factory=dict)  # spelling by kind (`eos_token`, ...)
    carried: bool = False  # as it was in a folder, whatever it does with special tokens
    chat: str | None = None  # what its chat template must make of the sample conversation; None: none was given


def write_described(
    state: CheckpointWeights, folder: Path, dtype: torch.dtype, tokenizer: Path | None, chats: bool
) -> Text:
    """Settings, tokenizer and card by what a checkpoint's configuration, its run's data and log say.

    Args:
        chats: whether there will be a chat template.
    """
    config, special, samples = state.config, Special(), []
    if tokenizer is not None:
        samples = sample_texts(config.data, tokenizer)
        special = write_tokenizer(tokenizer, folder, samples, config.data.seq_len, config.model.vocab_size, config.data)
        if special.ends is None:
            note(
                "neither manifest nor documents of the training data are there, so what came before and after each"
                " document is unknown: the tokenizer puts nothing before a text and declares no bos_token"
            )
    settings = {"tokens_per_sample": config.data.seq_len, **special.settings}
    write_json(folder / "config.json", config_json(config.model, dtype, settings))
    write_json(folder / GENERATION, special.settings)
    validation, calibrated = last_validation(state.path, state.step), read_capacity(state.path)
    if validation and calibrated is None and (far := far_from_training(config.model, validation.shares)):
        note(f"in the validation after {validation.step} steps {far}, before it is exported")
    training = describe_run(config, state.step, state.tokens, validation, calibrated)
    how = describe_tokenizer(special, chats=chats) if tokenizer is not None else None
    (folder / CARD).write_text(model_card(config.name, config.model, short(dtype), training, how), encoding="utf-8")
    return Text(tokenizer, tuple(samples), special.tokens)


def write_carried(
    state: ExportedWeights, folder: Path, dtype: torch.dtype, tokenizer: Path | None, carry_tokenizer: bool, chats: bool
) -> Text:
    """Settings, tokenizer and card as they are in the folder of the weights, as far as it has them."""
    own = carry_tokenizer and tokenizer is None
    taken = copy_carried_files(state.path, folder, tokenizer=own)
    there = read_json(state.path / "config.json")
    settings = {name: there[name] for name in ("tokens_per_sample", *IDS) if there.get(name) is not None}
    special = Special(special_of(state.path)) if own else Special()
    if tokenizer is not None:
        size, vocabulary = settings.get("tokens_per_sample"), state.network.vocab_size
        special = write_tokenizer(tokenizer, folder, [], size, vocabulary)
        generation = read_json(state.path / GENERATION)
        for said in (settings, generation):
            for name in IDS:
                said.pop(name, None)
            said |= special.settings
        write_json(folder / GENERATION, generation)
        taken = [name for name in taken if name != GENERATION]
    elif own:
        named = state.path / TOKENIZER
        refuse_larger(named, HFTokenizer(str(named)).model, state.network.vocab_size)
        if read_json(state.path / "tokenizer_config.json").get(SPLIT):
            note(
                f"{state.path} keeps the spelling of special tokens as text ({SPLIT} in its tokenizer_config.json), and"
                f" so will the copy; --tokenizer {named} writes the tokenizer again"
            )
    write_json(folder / "config.json", config_json(state.network, dtype, settings))
    if not (folder / GENERATION).is_file():
        write_json(folder / GENERATION, {name: settings[name] for name in IDS if name in settings})
    if CARD in taken:
        card = (folder / CARD).read_text(encoding="utf-8")
        (folder / CARD).write_text(with_dtype(card, short(dtype)), encoding="utf-8")
    else:
        how = describe_tokenizer(special, chats=chats, carried=own) if own or tokenizer is not None else None
        name = state.path.resolve().name
        (folder / CARD).write_text(model_card(name, state.network, short(dtype), None, how), encoding="utf-8")
    note(f"taken over from {state.path} as it is: {', '.join(taken) or 'nothing but the weights'}")
    return Text(tokenizer or (state.path / TOKENIZER if own else None), (), special.tokens, carried=own)


def config_json(network: ModelConfig, dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, Any]:
    """What transformers reads as the model's configuration."""
    return {
        "architectures": ["TaipanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_taipan.TaipanConfig",
            "AutoModel": "modeling_taipan.TaipanModel",
            "AutoModelForCausalLM": "modeling_taipan.TaipanForCausalLM",
            "AutoModelForSequenceClassification": "modeling_taipan.TaipanForSequenceClassification",
        },
        "model_type": "taipan",
        "dtype": short(dtype),
        **settings,
        "network": network.model_dump(mode="json"),
    }


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> bfloat16."""
    return str(dtype).removeprefix("torch.")


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
