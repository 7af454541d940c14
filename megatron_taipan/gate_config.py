"""The options of the gate, and values that change over training. The defaults are the paper's (arXiv 2410.18572)."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, field_validator, model_validator

from megatron_taipan.section import Section, option


class Schedule(Section):
    """A value that changes over training: `start` up to the step `after`, then towards `end`, which holds from `until`
    on. train/schedule.py computes its value at a step."""

    start: float = option(..., "value until `after`")
    end: float = option(..., "value from `until` on, in evaluation and in exports")
    after: int | float = option(0.0, "where the change begins: a step, or up to 1.0 a fraction of the run", ge=0)
    until: int | float = option(1.0, "where it ends: a step, or up to 1.0 a fraction of the run", gt=0)
    shape: Literal["linear", "cosine"] = option("linear", "how the value changes in between")

    @model_validator(mode="after")
    def _in_order(self) -> "Schedule":
        for name, point in (("after", self.after), ("until", self.until)):
            if isinstance(point, int) and point == 1:
                raise ValueError(f"{name}=1 may be a step or the whole run: write 1.0 for the run, or another step")
            if point > 1 and point != int(point):
                raise ValueError(f"{name}={point:g} is neither a whole step nor a fraction up to 1.0")
        if (self.after > 1) == (self.until > 1) and self.until < self.after:
            raise ValueError(f"until={self.until:g} is before after={self.after:g}")
        return self

    def step_of(self, point: float, run_steps: int) -> float:
        """`after` or `until` as a step of a run of `run_steps` steps."""
        return point if point > 1 else point * run_steps


SCHEDULED_TAGS = ("constant", "schedule")  # pydantic puts them into an error's location; they are not in the file


def _kind(value: Any) -> str:
    return "schedule" if isinstance(value, dict | Schedule) else "constant"


# Distinguishes a mapping from a number, so that an error is about the one that was meant.
Scheduled = Annotated[Annotated[float, Tag("constant")] | Annotated[Schedule, Tag("schedule")], Discriminator(_kind)]


def at_the_end(value: float | Schedule) -> float:
    """The final value of a constant or a schedule, which evaluation, exports and estimates of cost use.

    It does not ask for the class Schedule: transformers runs an exported folder's files twice, for the configuration
    and for the model, and a schedule that one of them made is not an instance of the other's class.
    """
    return value if isinstance(value, int | float) else value.end


class GateConfig(Section):
    """The gate of selective attention (`S`); arXiv 2410.18572.

    capacity, tau, budget_lambda and gradient_share are numbers or schedules: {start: 0.5, end: 0.15, after: 0.3,
    until: 0.7}.
    """

    capacity: Scheduled = option(
        0.15,
        "C: fraction of tokens that should be selected; a number, or a schedule such as {start: 0.5, end: 0.15,"
        " after: 0.3, until: 0.7, shape: linear} (or cosine)",
    )
    tau: Scheduled = option(1.0, "temperature of the selection in training; a number or a schedule")
    budget_lambda: Scheduled = option(1.0, "weight of the budget loss; a number or a schedule")
    budget: Literal["row", "batch", "layers"] = option(
        "row",
        "what has to keep to C, in each selective layer every row, or the global batch of a step (by the share of the"
        " step before); layers: that batch in all selective layers together",
    )
    input_gradient: Literal["all", "task", "none"] = option(
        "all",
        "what reaches the layers before through the gate's input: all; task: the cross entropy's gradient, not the"
        " budget's; none: the gate reads, and changes nothing but itself",
    )
    gradient: Literal["selected", "all", "sampled"] = option(
        "selected",
        "selected: only selected queries are computed; all: every query, exact gate gradient; sampled: all in a share"
        " of the steps",
    )
    gradient_share: Scheduled = option(
        0.1,
        "share of the steps with gradient=sampled that compute every query; a number or a schedule, such as"
        " {start: 1.0, end: 0.1, after: 0.3, until: 0.7}",
    )
    refinement: Literal["replace", "add"] = option(
        "replace", "selected tokens become h + weight (o - h), or with add h + weight o"
    )
    weight: Literal["alpha", "one"] = option("alpha", "weight of a selected token's attention: the gate's alpha, or 1")
    noise: Literal["gumbel", "none", "random"] = option(
        "gumbel",
        "of the selection in training; none: by the logits alone; random: a control, tokens are drawn with probability"
        " C in training and evaluation, whatever the gate says",
    )
    estimator: Literal["straight-through", "reinmax"] = option(
        "straight-through",
        "gradient of the selection in training; reinmax: second order (arXiv 2304.08612), with noise=gumbel",
    )
    init_bias: float = option(0.0, "s1 - s0 at initialisation: 2 selects 88 % of the tokens at first")
    threshold: float = option(0.0, "evaluation selects a token where s1 - s0 exceeds this (calibration overrides it)")

    @field_validator("capacity", "tau", "budget_lambda", "gradient_share")
    @classmethod
    def _values_fit(cls, value: float | Schedule, field: Any) -> float | Schedule:
        for number in (value.start, value.end) if isinstance(value, Schedule) else (value,):
            match field.field_name:
                case "capacity" if not 0 <= number <= 1:
                    raise ValueError(f"{number:g} is not a fraction between 0 and 1")
                case "tau" if number <= 0:
                    raise ValueError(f"{number:g} must be greater than 0")
                case "budget_lambda" if number < 0:
                    raise ValueError(f"{number:g} must be at least 0")
                case "gradient_share" if not 0 <= number <= 1:
                    raise ValueError(f"{number:g} is not a share of the steps between 0 and 1")
                case "gradient_share" if value == 0:
                    raise ValueError("no step would compute every query: that is gradient=selected")
        return value

    @model_validator(mode="after")
    def _estimator_has_draws(self) -> "GateConfig":
        if self.estimator == "reinmax" and self.noise != "gumbel":
            raise ValueError(
                f"estimator=reinmax averages over what noise=gumbel draws; with noise={self.noise} use straight-through"
            )
        return self

    @property
    def final_capacity(self) -> float:
        """C at the end of training."""
        return at_the_end(self.capacity)
