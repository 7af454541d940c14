"""Lengths of a run in tokens: `train.steps: 300B tokens` is as many steps as it takes to read them."""

import math
import re
from typing import Any

# Options that may be given in tokens, by section. They hold steps from then on, in checkpoints too.
IN_TOKENS = {"train": ("steps", "stop_at"), "optim": ("warmup_steps", "decay_steps", "wsd_decay_steps")}
SIZES = ("train", "data")  # sections that say how many tokens a step takes
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
WRITTEN = re.compile(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*([KMBT]?)\s*tokens?\s*", re.IGNORECASE)


def lengths_in_steps(tree: Any, *, default_seq_len: Any) -> Any:
    """The configuration's tree with every length of tokens as steps, rounded up; in a stage by the stage's own batch.

    Args:
        tree: as read, not validated: anything else than the texts that `WRITTEN` matches is left as it is.
        default_seq_len: data.seq_len where the tree does not give it.

    Raises:
        ValueError: a length is in tokens, and train.global_batch or data.seq_len is not a number of at least 1.
    """
    if not isinstance(tree, dict):
        return tree
    changed = dict(tree)
    for section, names in IN_TOKENS.items():
        options = tree.get(section)
        if not isinstance(options, dict):
            continue
        for name in names:
            if isinstance(text := options.get(name), str) and (match := WRITTEN.fullmatch(text)):
                tokens = float(re.sub("[_,]", "", match[1])) * UNITS[match[2].upper()]
                per_step = _tokens_per_step(tree, default_seq_len, f"{section}.{name}={text!r}")
                changed[section] = {**changed[section], name: math.ceil(tokens / per_step)}
    if isinstance(stages := tree.get("stages"), list) and stages:
        if isinstance(steps := (tree.get("train") or {}).get("steps"), str):
            raise ValueError(f"train.steps={steps!r} is in tokens, and stages may differ in the tokens of a step; give"
                             " the stages' lengths in tokens, and leave train.steps out")  # fmt: skip
        changed["stages"] = [_stage_in_steps(stage, tree, default_seq_len) for stage in stages]
    return changed


def _stage_in_steps(stage: Any, tree: dict, default_seq_len: Any) -> Any:
    """One stage of the tree, its own length among those that become steps."""
    if not isinstance(stage, dict):
        return stage
    both = {name: [part for part in (tree.get(name), stage.get(name)) if isinstance(part, dict)] for name in SIZES}
    sizes: dict[str, Any] = {name: {k: v for part in parts for k, v in part.items()} for name, parts in both.items()}
    sizes["train"]["steps"] = stage.get("steps")
    converted = lengths_in_steps(sizes | {"optim": stage.get("optim")}, default_seq_len=default_seq_len)
    lengths = {"steps": converted["train"]["steps"], "optim": converted["optim"]}
    return stage | {name: value for name, value in lengths.items() if name in stage}


def _tokens_per_step(tree: dict, default_seq_len: Any, what: str) -> int:
    sizes: dict[str, Any] = {
        f"{section}.{name}": (tree.get(section) or {}).get(name, default)
        for section, name, default in (("train", "global_batch", None), ("data", "seq_len", default_seq_len))
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{what} is in tokens, which takes {name}, and that is {size!r}; give it, or give steps")
    return math.prod(sizes.values())
