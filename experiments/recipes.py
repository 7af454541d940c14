"""Recipes that the experiments compare by name: which attention a hybrid has, and how its gate learns.

The reference models come first, then the gate as the paper has it (arXiv 2410.18572), then what was tried to make it
learn. A name says what differs: anneal, lambda and open are schedules; all and sampled are gradients of the gate; add
is the refinement; batch is the budget.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One way to build and train a hybrid."""

    attention: str  # letter of the last layer of a group of layers; what stands before it says the experiment
    gate: dict[str, Any] = field(default_factory=dict)  # options that differ from GateConfig's defaults


ANNEAL = {"start": 0.5, "end": 0.15, "after": 0.3, "until": 0.7}
OPEN = {**ANNEAL, "start": 1.0}
LATE = {**OPEN, "until": 0.9, "shape": "cosine"}
LAMBDA = {"start": 0.0, "end": 5.0, "after": 0.3, "until": 0.7}
STEEP_LAMBDA = {"start": 0.0, "end": 10.0, "after": 0.3, "until": 0.6}
# The budget trains the gate alone and not the layers whose output it reads; over the batch, with a weight that grows.
FALLING = {"start": 0.5, "end": 0.16, "after": 0.2, "until": 0.6}
STEER: dict[str, Any] = {
    "capacity": FALLING,
    "budget_lambda": {"start": 1.0, "end": 10.0, "after": 0.2, "until": 0.6},
    "budget": "batch", "input_gradient": "task", "gradient": "all", "refinement": "add", "weight": "one",
}  # fmt: skip
READ = {**STEER, "input_gradient": "none"}  # the gate reads the layers' output, and no gradient goes back through it
# The layers together keep to C, by a gate that only reads, whose gradient is second order (ReinMax).
WEIGH: dict[str, Any] = {**READ, "budget": "layers", "estimator": "reinmax", "capacity": {**FALLING, "end": 0.19}}
PRICE: dict[str, Any] = {
    **WEIGH,
    "capacity": {**FALLING, "end": 0.15},
    "budget_lambda": {**READ["budget_lambda"], "end": 30.0},
}  # fmt: skip
LATER = {"start": 1.0, "end": 0.19, "after": 0.35, "until": 0.75}
ALL, ADD, BATCH = {"gradient": "all"}, {"refinement": "add"}, {"budget": "batch"}

RECIPES = {
    "mamba2": Recipe("M"),
    "samba": Recipe("W"),
    "jamba": Recipe("A"),
    "transformerpp": Recipe("A"),  # has no other layers: the experiments ask for its name
    "paper": Recipe("S"),
    "paper-all": Recipe("S", ALL),
    "C0.3": Recipe("S", {"capacity": 0.3}),
    "C0.5": Recipe("S", {"capacity": 0.5}),
    "low-lambda": Recipe("S", {"budget_lambda": 0.01}),
    "anneal": Recipe("S", {"capacity": ANNEAL}),
    "anneal-all": Recipe("S", {"capacity": ANNEAL, **ALL}),
    "anneal-add": Recipe("S", {"capacity": ANNEAL, **ADD}),
    "anneal-all-add": Recipe("S", {"capacity": ANNEAL, **ALL, **ADD}),
    "lambda-all": Recipe("S", {"budget_lambda": LAMBDA, **ALL}),
    "lambda-all-add": Recipe("S", {"budget_lambda": LAMBDA, **ALL, **ADD}),
    "anneal-batch-all-add": Recipe("S", {"capacity": ANNEAL, **BATCH, **ALL, **ADD}),
    "lambda-batch-all-add": Recipe("S", {"budget_lambda": STEEP_LAMBDA, **BATCH, **ALL, **ADD}),
    "lambda-open": Recipe(
        "S", {"budget_lambda": STEEP_LAMBDA, "init_bias": 2.0, "weight": "one", **BATCH, **ALL, **ADD}
    ),
    "lambda-open-layers": Recipe(
        "S", {"budget_lambda": STEEP_LAMBDA, "init_bias": 2.0, "weight": "one", "budget": "layers", **ALL, **ADD}
    ),
    "open-all-add": Recipe("S", {"capacity": OPEN, "init_bias": 2.0, **ALL, **ADD}),
    "open-all": Recipe("S", {"capacity": OPEN, "init_bias": 2.0, **ALL}),
    "open-add": Recipe("S", {"capacity": OPEN, "init_bias": 2.0, **ADD}),
    "open-batch-all-add": Recipe(
        "S", {"capacity": OPEN, "init_bias": 2.0, "budget_lambda": 5.0, **BATCH, **ALL, **ADD}
    ),
    "open-late-all-add": Recipe("S", {"capacity": LATE, "init_bias": 2.0, "budget_lambda": 5.0, **ALL, **ADD}),
    "steer": Recipe("S", STEER),
    "steer-all": Recipe("S", {**STEER, "input_gradient": "all"}),
    "steer-open": Recipe("S", {**STEER, "capacity": {**FALLING, "start": 1.0}, "init_bias": 2.0}),
    "steer-half": Recipe("S", {**STEER, "capacity": 0.5}),  # not within the budget: what a larger share would bring
    "steer-alpha": Recipe("S", {**STEER, "weight": "alpha"}),
    "steer-none": Recipe("S", {**STEER, "noise": "none"}),
    "read": Recipe("S", READ),
    "read-open": Recipe("S", {**READ, "capacity": {**FALLING, "start": 1.0}, "init_bias": 2.0}),
    "read-none": Recipe("S", {**READ, "noise": "none"}),
    "read-alpha": Recipe("S", {**READ, "weight": "alpha"}),
    "read-layers": Recipe("S", {**READ, "budget": "layers"}),
    "read-half": Recipe("S", {**READ, "capacity": 0.5}),  # not within the budget
    "read-late": Recipe("S", {**READ, "budget": "layers", "noise": "none", "capacity": LATER, "init_bias": 2.0}),
    "weigh": Recipe("S", WEIGH),
    "weigh-open": Recipe("S", {**WEIGH, "capacity": LATER, "init_bias": 2.0}),
    "weigh-all": Recipe("S", {**WEIGH, "input_gradient": "all"}),
    "price": Recipe("S", PRICE),
    "price-early": Recipe(
        "S",
        {
            **PRICE,
            "capacity": {**ANNEAL, "after": 0.05, "until": 0.4},
            "budget_lambda": {**PRICE["budget_lambda"], "after": 0.05, "until": 0.4},
        },
    ),
    "price-open": Recipe("S", {**PRICE, "capacity": {**FALLING, "start": 1.0, "end": 0.15}, "init_bias": 2.0}),
    "price-all": Recipe("S", {**PRICE, "input_gradient": "all"}),
    "price-alpha": Recipe("S", {**PRICE, "weight": "alpha"}),
    "price-straight": Recipe("S", {**PRICE, "estimator": "straight-through"}),
    "anneal-sampled-add": Recipe("S", {"capacity": ANNEAL, "gradient": "sampled", "gradient_share": 0.1, **ADD}),
    "anneal-all-add-one": Recipe("S", {"capacity": ANNEAL, "weight": "one", **ALL, **ADD}),
    "anneal-none-all-add": Recipe("S", {"capacity": ANNEAL, "noise": "none", **ALL, **ADD}),
    "random": Recipe("S", {"noise": "random", **ADD}),  # the control: tokens are drawn, nothing is learnt
}


def gate_options(name: str, **changes: Any) -> dict[str, Any]:
    """The recipe's options of the gate, as ModelConfig.gate takes them, with some changed.

    Args:
        changes: option to value; where the recipe has a schedule, a number replaces what the schedule leads to.
    """
    options = dict(RECIPES[name].gate)
    for option, value in changes.items():
        before = options.get(option)
        if isinstance(before, dict) and not isinstance(value, dict):
            value = {**before, "end": value}
        options[option] = value
    return options
