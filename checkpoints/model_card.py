"""The README.md of an exported model."""

from megatron_taipan.config import Config
from megatron_taipan.parallel.layout import describe
from megatron_taipan.pattern import LETTERS
from megatron_taipan.versions import TRANSFORMERS_NEWEST, TRANSFORMERS_OLDEST

MAMBA2, TAIPAN = "arXiv 2405.21060", "arXiv 2410.18572"


def model_card(config: Config, step: int | None, tokens: int | None, dtype: str, has_tokenizer: bool) -> str:
    """What the model is, how to load it, how it was trained; in the Hub's format (YAML header, Markdown).

    Args:
        step: optimizer steps of the weights, where known; tokens: that were trained on in them. The batch may have
            changed on the way.
    """
    model, train, data, optim = config.model, config.train, config.data, config.optim
    n_params = sum(_count(spec.shape) for spec in describe(model).values())
    layers = ", ".join(f"{model.letters.count(k)} x {name}" for k, name in LETTERS.items() if k in model.letters)
    growing = ", except for the keys and values of full attention layers" if "A" in model.letters else ""
    trained = f"{step:,} steps, {tokens:,} tokens" if step and tokens else "not recorded"
    load_tokenizer = (
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n" if has_tokenizer else ""
    )
    prompt = (
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        if has_tokenizer
        else 'inputs = {"input_ids": torch.tensor([[1, 2, 3]])}  # this export holds no tokenizer\n'
    )
    show = "tokenizer.decode(output[0], skip_special_tokens=True)" if has_tokenizer else "output[0].tolist()"
    selective = (
        f"- selective attention: window {model.attention.window}, capacity {model.gate.final_capacity:g}"
        " of the tokens\n"
        if "S" in model.letters
        else ""
    )
    releases = f"{TRANSFORMERS_OLDEST} or later (tested up to {TRANSFORMERS_NEWEST})"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags_of(model.letters)}]
---

# {config.name}

A causal language model of {n_params:,} parameters in {dtype}, trained with Megatron-Taipan. Architecture:
{family_of(model.letters)}.

- layer pattern `{model.pattern}`: {layers}
- d_model {model.d_model}, SwiGLU {model.d_ff}, vocabulary {model.vocab_size:,}
{selective}- training: {trained}; samples of {data.seq_len:,} tokens; AdamW, peak learning rate {optim.lr:g}, weight
  decay {optim.weight_decay:g}, gradient clipping {optim.grad_clip:g}, {train.precision}

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

Generation keeps a state of constant size{growing}; batches are padded on the left.

## Limits

The model repeats what its training text holds, errors and prejudices included, and knows nothing else. It has not
been aligned to follow instructions.
"""


def family_of(letters: str) -> str:
    """The architecture of the layers `letters`, with its source."""
    kinds = set(letters)
    if kinds == {"M"}:
        return f"Mamba-2 ({MAMBA2})"
    if "S" in kinds:
        others = "a Mamba-2 network" if "M" in kinds else "a transformer"
        return f"Taipan, {others} with selective attention layers ({TAIPAN})"
    attention = {"W": "sliding-window attention", "A": "full causal attention"}
    names = " and ".join(name for letter, name in attention.items() if letter in kinds)
    return f"a hybrid of Mamba-2 ({MAMBA2}) and {names} layers" if "M" in kinds else f"a transformer with {names}"


def tags_of(letters: str) -> str:
    """The Hub's tags, separated by commas."""
    tags = ["taipan", *["mamba2"] * ("M" in letters), *["selective-attention"] * ("S" in letters), "causal-lm"]
    return ", ".join(tags)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
