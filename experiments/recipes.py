"""Recipes that the experiments compare by name: which attention a hybrid has, and how its gate learns.

The reference models come first, then the gate as the paper has it (arXiv 2410.18572), then what was tried to make it
learn. A name says what differs: anneal, lambda and open are schedules; all and sampled are gradients of the gate; add
is the refinement; batch is the budget.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GateRecipe:
    """One way to build and train a hybrid."""

    attention: str  # letter of the last layer of a group of layers; the experiment chooses the layers before it
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
# All layers together keep to C, with a gate that only reads and whose gradient is second order (ReinMax).
WEIGH: dict[str, Any] = {**READ, "budget": "layers", "estimator": "reinmax", "capacity": {**FALLING, "end": 0.19}}
PRICE: dict[str, Any] = {
    **WEIGH,
    "capacity": {**FALLING, "end": 0.15},
    "budget_lambda": {**READ["budget_lambda"], "end": 30.0},
}  # fmt: skip
LATER = {"start": 1.0, "end": 0.19, "after": 0.35, "until": 0.75}
ALL, ADD, BATCH = {"gradient": "all"}, {"refinement": "add"}, {"budget": "batch"}

RECIPES = {
    "mamba2": GateRecipe("M"),
    "samba": GateRecipe("W"),
    "jamba": GateRecipe("A"),
    "transformerpp": GateRecipe("A"),  # has no other layers: the experiments ask for its name
    "paper": GateRecipe("S"),
    "paper-all": GateRecipe("S", ALL),
    "C0.3": GateRecipe("S", {"capacity": 0.3}),
    "C0.5": GateRecipe("S", {"capacity": 0.5}),
    "low-lambda": GateRecipe("S", {"budget_lambda": 0.01}),
    "anneal": GateRecipe("S", {"capacity": ANNEAL}),
    "anneal-all": GateRecipe("S", {"capacity": ANNEAL, **ALL}),
    "anneal-add": GateRecipe("S", {"capacity": ANNEAL, **ADD}),
    "anneal-all-add": GateRecipe("S", {"capacity": ANNEAL, **ALL, **ADD}),
    "lambda-all": GateRecipe("S", {"budget_lambda": LAMBDA, **ALL}),
    "lambda-all-add": GateRecipe("S", {"budget_lambda": LAMBDA, **ALL, **ADD}),
    "anneal-batch-all-add": GateRecipe("S", {"capacity": ANNEAL, **BATCH, **ALL, **ADD}),
    "lambda-batch-all-add": GateRecipe("S", {"budget_lambda": STEEP_LAMBDA, **BATCH, **ALL, **ADD}),
    "lambda-open": GateRecipe(
        "S", {"budget_lambda": STEEP_LAMBDA, "init_bias": 2.0, "weight": "one", **BATCH, **ALL, **ADD}
    ),
    "lambda-open-layers": GateRecipe(
        "S", {"budget_lambda": STEEP_LAMBDA, "init_bias": 2.0, "weight": "one", "budget": "layers", **ALL, **ADD}
    ),
    "open-all-add": GateRecipe("S", {"capacity": OPEN, "init_bias": 2.0, **ALL, **ADD}),
    "open-all": GateRecipe("S", {"capacity": OPEN, "init_bias": 2.0, **ALL}),
    "open-add": GateRecipe("S", {"capacity": OPEN, "init_bias": 2.0, **ADD}),
    "open-batch-all-add": GateRecipe(
        "S", {"capacity": OPEN, "init_bias": 2.0, "budget_lambda": 5.0, **BATCH, **ALL, **ADD}
    ),
    "open-late-all-add": GateRecipe("S", {"capacity": LATE, "init_bias": 2.0, "budget_lambda": 5.0, **ALL, **ADD}),
    "steer": GateRecipe("S", STEER),
    "steer-all": GateRecipe("S", {**STEER, "input_gradient": "all"}),
    "steer-open": GateRecipe("S", {**STEER, "capacity": {**FALLING, "start": 1.0}, "init_bias": 2.0}),
    "steer-half": GateRecipe("S", {**STEER, "capacity": 0.5}),  # not within the budget: what a larger share would bring
    "steer-alpha": GateRecipe("S", {**STEER, "weight": "alpha"}),
    "steer-none": GateRecipe("S", {**STEER, "noise": "none"}),
    "read": GateRecipe("S", READ),
    "read-open": GateRecipe("S", {**READ, "capacity": {**FALLING, "start": 1.0}, "init_bias": 2.0}),
    "read-none": GateRecipe("S", {**READ, "noise": "none"}),
    "read-alpha": GateRecipe("S", {**READ, "weight": "alpha"}),
    "read-layers": GateRecipe("S", {**READ, "budget": "layers"}),
    "read-half": GateRecipe("S", {**READ, "capacity": 0.5}),  # not within the budget
    "read-late": GateRecipe("S", {**READ, "budget": "layers", "noise": "none", "capacity": LATER, "init_bias": 2.0}),
    "weigh": GateRecipe("S", WEIGH),
    "weigh-open": GateRecipe("S", {**WEIGH, "capacity": LATER, "init_bias": 2.0}),
    "weigh-all": GateRecipe("S", {**WEIGH, "input_gradient": "all"}),
    "price": GateRecipe("S", PRICE),
    "price-early": GateRecipe(
        "S",
        {
            **PRICE,
            "capacity": {**ANNEAL, "after": 0.05, "until": 0.4},
            "budget_lambda": {**PRICE["budget_lambda"], "after": 0.05, "until": 0.4},
        },
    ),
    "price-open": GateRecipe("S", {**PRICE, "capacity": {**FALLING, "start": 1.0, "end": 0.15}, "init_bias": 2.0}),
    "price-all": GateRecipe("S", {**PRICE, "input_gradient": "all"}),
    "price-alpha": GateRecipe("S", {**PRICE, "weight": "alpha"}),
    "price-straight": GateRecipe("S", {**PRICE, "estimator": "straight-through"}),
    "anneal-sampled-add": GateRecipe("S", {"capacity": ANNEAL, "gradient": "sampled", "gradient_share": 0.1, **ADD}),
    "anneal-all-add-one": GateRecipe("S", {"capacity": ANNEAL, "weight": "one", **ALL, **ADD}),
    "anneal-none-all-add": GateRecipe("S", {"capacity": ANNEAL, "noise": "none", **ALL, **ADD}),
    "random": GateRecipe("S", {"noise": "random", **ADD}),  # the control: tokens are drawn, nothing is learned
}


def gate_options(name: str, **changes: Any) -> dict[str, Any]:
    """The recipe's options of the gate, as ModelConfig.gate takes them, with some changed.

    Args:
        changes: option to value; where the recipe has a schedule, a number replaces the schedule's final value.
    """
    options = dict(RECIPES[name].gate)
    for option, value in changes.items():
        before = options.get(option)
        if isinstance(before, dict) and not isinstance(value, dict):
            value = {**before, "end": value}
        options[option] = value
    return options
