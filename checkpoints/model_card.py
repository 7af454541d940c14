"""The README.md of an exported model."""

import re

from checkpoints.run_metrics import Validation
from checkpoints.tokenizer import SPLIT, Special
from megatron_taipan.config import Config
from megatron_taipan.layer_kinds.mamba2 import MAMBA2
from megatron_taipan.layer_kinds.registry import kinds_of
from megatron_taipan.layer_kinds.selective import SELECTIVE_ATTENTION
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parameters import parameter_table
from megatron_taipan.versions import TRANSFORMERS_NEWEST, TRANSFORMERS_OLDEST

MAMBA2_PAPER, TAIPAN_PAPER = "arXiv 2405.21060", "arXiv 2410.18572"


def model_card(name: str, model: ModelConfig, dtype: str, training: str | None, tokenizer: str | None) -> str:
    """What the model is, how to load it, how it was trained; in the Hub's format (YAML header, Markdown).

    Args:
        training: `describe_run`; None: nothing is known. tokenizer: `describe_tokenizer`; None: the export has none.
    """
    has_tokenizer = tokenizer is not None
    n_params = sum(_count(spec.shape) for spec in parameter_table(model).values())
    kinds = kinds_of(model.letters)
    layers = ", ".join(f"{model.letters.count(kind.letter)} x {kind.name}" for kind in kinds)
    growing = "".join(f", except for the keys and values of {kind.name}s" for kind in kinds if kind.growing)
    load_tokenizer = (
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n" if has_tokenizer else ""
    )
    prompt = (
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        if has_tokenizer
        else 'inputs = {"input_ids": torch.tensor([[1, 2, 3]])}  # this export holds no tokenizer\n'
    )
    show = "tokenizer.decode(output[0], skip_special_tokens=True).strip()" if has_tokenizer else "output[0].tolist()"
    selective = (
        f"- selective attention: window {model.attention.window}, capacity {model.gate.final_capacity:g}"
        " of the tokens\n"
        if model.gated_layers
        else ""
    )
    releases = f"{TRANSFORMERS_OLDEST} or later (tested up to {TRANSFORMERS_NEWEST})"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags_of(model.letters)}]
---

# {name}

A causal language model of {n_params:,} parameters in {dtype}, trained with Megatron-Taipan. Architecture:
{family_of(model.letters)}.

- layer pattern `{model.pattern}`: {layers}
- d_model {model.d_model}, SwiGLU {model.d_ff}, vocabulary {model.vocab_size:,}
{selective}{training or "- training: not recorded"}

## Use

Needs `torch`, `pydantic` and `transformers` {releases}. The model's code is in this folder, hence
`trust_remote_code=True` (not needed where `megatron_taipan.hf` has been imported; AutoTokenizer asks for it because it
looks at the model's configuration too).

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
{load_tokenizer}model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
{prompt}output = model.generate(**inputs, max_new_tokens=100, do_sample=True, top_p=0.9)
print({show})
```

Generation keeps a state of constant size{growing}; batches are padded on the left. `sha256sum -c SHA256SUMS` compares
the files with what was written.

{tokenizer or ""}## Limits

The model repeats what its training text holds, errors and prejudices included, and knows nothing else. It has not
been aligned to follow instructions.
"""


def describe_run(
    config: Config, step: int | None, tokens: int | None, validation: Validation | None, calibrated: float | None
) -> str:
    """How the weights were trained and how good they were, as lines of a list.

    Args:
        step: optimizer steps of the weights, where known; tokens: that were trained on in them. The batch may have
            changed on the way.
        calibrated: share of held-out tokens that the gates' thresholds were set to select afterwards; None: they are
            those of training.
    """
    train, data, optim = config.train, config.data, config.optim
    trained = f"{step:,} steps, {tokens:,} tokens" if step and tokens else "not recorded"
    optimizer = "Muon (matrices) and AdamW" if optim.name == "muon" else "AdamW"
    lines = [
        f"- training: {trained}; samples of {data.seq_len:,} tokens; {optimizer}, peak learning rate\n"
        f"  {optim.lr:g}, weight decay {optim.weight_decay:g}, gradient clipping {optim.grad_clip:g}, {train.precision}"
    ]
    if validation is not None:
        lines.append(
            f"- validation after {validation.step:,} steps: loss {validation.loss:.4f} (nats a token), perplexity"
            f" {validation.perplexity:.2f},\n  on {validation.tokens:,} held-out tokens"
        )
        if validation.selected is not None:
            lines.append(f"- of these, selective attention took {validation.selected:.1%} (mean over its layers)")
    if calibrated is not None:
        lines.append(f"- thresholds of the gates calibrated afterwards to select {calibrated:.1%} of held-out tokens")
    return "\n".join(lines)


def describe_tokenizer(special: Special, *, chats: bool, carried: bool = False) -> str:
    """A section on what the tokenizer does with text.

    Args:
        chats: the export has a chat template.
        carried: the tokenizer came with the weights, and nothing is known of the data.
    """
    begin, eos, ends = special.tokens.get("bos_token"), special.tokens.get("eos_token"), special.ends
    lines = ["## Text", ""]
    if not carried:
        lines += [
            "The spelling of a special token in a text becomes its id, as code for other models expects; in the",
            f"training data it was text. For text from strangers pass `{SPLIT}=True` to a call or to",
            "`from_pretrained`.",
            "",
        ]
        if ends is None:
            lines.append("- what came before each training document is not known: nothing is put before a prompt")
        elif begin is None:
            lines.append(
                "- nothing came before the training documents: nothing is put before a prompt, there is no BOS"
            )
        else:
            lines.append(f"- `{begin}` came before each training document, and is put before a prompt")
        if ends is not None and ends.end is not None:
            lines.append(f"- `{eos}` came after each: with it the model ends a text")
        elif eos is not None:
            lines.append(f"- `{eos}` is there to fine-tune with; that the model ends texts with it is not known")
    lines += [
        "- a space that the tokenizer puts before the first word of a text is shown when its ids are decoded, so that",
        "  a continuation can be joined to its prompt",
    ]
    if chats:
        lines.append("- `tokenizer.apply_chat_template(messages, add_generation_prompt=True)` writes conversations")
    return "\n".join([*lines, "", ""])


def with_dtype(card: str, dtype: str) -> str:
    """A card that `model_card` wrote, of the same weights in another type; any other card as it is."""
    return re.sub(r"(parameters in )\w+(, trained with Megatron-Taipan)", rf"\g<1>{dtype}\g<2>", card, count=1)


def family_of(letters: str) -> str:
    """The architecture of the layers `letters`, with its source."""
    kinds = kinds_of(letters)
    mamba = MAMBA2 in kinds
    if SELECTIVE_ATTENTION in kinds:
        others = "a Mamba-2 network" if mamba else "a transformer"
        return f"Taipan, {others} with selective attention layers ({TAIPAN_PAPER})"
    names = " and ".join(kind.mixer for kind in kinds if kind is not MAMBA2)
    if not names:
        return f"Mamba-2 ({MAMBA2_PAPER})"
    return f"a hybrid of Mamba-2 ({MAMBA2_PAPER}) and {names} layers" if mamba else f"a transformer with {names}"


def tags_of(letters: str) -> str:
    """The Hub's tags, separated by commas."""
    kinds = kinds_of(letters)
    tags = ["mamba2"] * (MAMBA2 in kinds) + ["selective-attention"] * (SELECTIVE_ATTENTION in kinds)
    return ", ".join(["taipan", *tags, "causal-lm"])


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
