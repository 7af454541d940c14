"""Lengths of a run in tokens: `train.steps: 300B tokens` is as many steps as it takes to read them."""

import math
import re
from fractions import Fraction
from typing import Any

# Options that may be given in tokens, by section. They hold steps from then on, in checkpoints too.
IN_TOKENS = {"train": ("steps", "stop_at"), "optim": ("warmup_steps", "decay_steps", "wsd_decay_steps")}
SIZES = ("train", "data")  # sections that say how many tokens a step takes
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
WRITTEN = re.compile(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*([KMBT]?)\s*tokens?\s*", re.IGNORECASE)


def lengths_in_steps(tree: Any, *, default_seq_len: Any) -> Any:
    """The configuration's tree with every length of tokens as steps, rounded up; in a stage by the stage's own batch,
    and of a run in stages by the batches of the stages that it crosses.

    Args:
        tree: as read, not validated: anything else than the texts that `WRITTEN` matches is left as it is.
        default_seq_len: data.seq_len where the tree does not give it.

    Raises:
        ValueError: a length is in tokens, and train.global_batch or data.seq_len is not a number of at least 1; or
            stages differ in the tokens of a step, and it is not said in which of them it lies.
    """
    if not isinstance(tree, dict):
        return tree
    changed = dict(tree)
    stages = tree["stages"] if isinstance(tree.get("stages"), list) else []
    if stages:
        if isinstance(steps := _section(tree, "train").get("steps"), str):
            raise ValueError(f"train.steps={steps!r} is in tokens, and stages may differ in the tokens of a step; give"
                             " the stages' lengths in tokens, and leave train.steps out")  # fmt: skip
        changed["stages"] = [_stage_in_steps(stage, tree, default_seq_len) for stage in stages]
    for section, names in IN_TOKENS.items():
        for name in names:
            text = _section(tree, section).get(name)
            if isinstance(text, str) and (match := WRITTEN.fullmatch(text)):
                what, tokens = f"{section}.{name}={text!r}", _tokens(match)
                crossed = _crossed(changed["stages"] if stages else [], tree, default_seq_len, what)
                if name == "wsd_decay_steps" and len({per_step for _, per_step in crossed}) > 1:
                    raise ValueError(
                        f"{what} is in tokens, counted back from the end of the decay, and stages differ in the tokens"
                        " of a step; give it in steps, or in the stage that decays"
                    )
                changed[section] = {**changed[section], name: _steps(tokens, crossed)}
    return changed


def _stage_in_steps(stage: Any, tree: dict, default_seq_len: Any) -> Any:
    """One stage of the tree, its own length among those that become steps."""
    if not isinstance(stage, dict):
        return stage
    sizes = _sizes(stage, tree)
    sizes["train"]["steps"] = stage.get("steps")
    converted = lengths_in_steps(sizes | {"optim": stage.get("optim")}, default_seq_len=default_seq_len)
    lengths = {"steps": converted["train"]["steps"], "optim": converted["optim"]}
    return stage | {name: value for name, value in lengths.items() if name in stage}


def _sizes(stage: dict, tree: dict) -> dict[str, dict]:
    """SIZES as they hold in a stage; what it gives as null is as in the rest of the tree."""
    return {
        name: _section(tree, name) | {k: v for k, v in _section(stage, name).items() if v is not None} for name in SIZES
    }


def _section(tree: dict, name: str) -> dict:
    """A section of the tree; empty where it is something else, which validation refuses."""
    section = tree.get(name)
    return section if isinstance(section, dict) else {}


def _crossed(stages: list, tree: dict, default_seq_len: Any, what: str) -> list[tuple[Any, int]]:
    """Steps and tokens a step of each stage; without stages of the run, whose steps do not matter."""
    each = [stage for stage in stages if isinstance(stage, dict)] or [{}]
    return [(stage.get("steps"), _tokens_per_step(_sizes(stage, tree), default_seq_len, what)) for stage in each]


def _tokens(match: re.Match) -> Fraction:
    return Fraction(re.sub("[_,]", "", match[1])) * UNITS[match[2].upper()]


def _steps(tokens: Fraction, crossed: list[tuple[Any, int]]) -> int:
    """Steps that take so many tokens from the run's start on.

    Args:
        crossed: of each stage its steps and the tokens of one of them; the last one goes on without end.
    """
    taken = 0
    for steps, per_step in crossed[:-1]:
        if not isinstance(steps, int) or tokens <= steps * per_step:
            return taken + math.ceil(tokens / per_step)
        taken, tokens = taken + steps, tokens - steps * per_step
    return taken + math.ceil(tokens / crossed[-1][1])


def _tokens_per_step(tree: dict, default_seq_len: Any, what: str) -> int:
    sizes: dict[str, Any] = {
        f"{section}.{name}": _section(tree, section).get(name, default)
        for section, name, default in (("train", "global_batch", None), ("data", "seq_len", default_seq_len))
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{what} is in tokens, which takes {name}, and that is {size!r}; give it, or give steps")
    return math.prod(sizes.values())
