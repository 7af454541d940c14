"""Options of the optimizer and of its learning rate."""

from typing import Literal

from pydantic import field_validator, model_validator

from megatron_taipan.section import Section, option


class ParameterGroup(Section):
    """Parameters with a learning rate or a weight decay of their own."""

    match: str = option(..., "pattern of parameter names, such as embedding.* or layers.*.gate.*; * is any text")
    lr: float = option(1.0, "factor of the learning rate; 0 keeps them as they are", ge=0)
    weight_decay: float | None = option(
        None, "in place of optim.weight_decay, also of what has none; null: as before", ge=0
    )


class OptimConfig(Section):
    """The optimizer and its schedule: a linear warm-up to the peak, then one of the shapes of train/schedule.py.

    Lengths are steps, or tokens such as "2B tokens", which become steps when the configuration is read.
    """

    name: Literal["adamw", "muon"] = option(
        "adamw",
        "muon: Muon for the projections in the layers, AdamW for everything else (embedding, head, norms, convolutions,"
        " gates, vectors); zero_stage 0 to 2, no offload",
    )
    lr: float = option(5e-4, "peak learning rate", gt=0)
    min_lr: float = option(1e-5, "learning rate at the end of the decay", ge=0)
    warmup_steps: int = option(2000, "steps of linear warm-up from 0", ge=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine",
        "after the warm-up: cosine or linear down to min_lr; constant; wsd: constant, then down in the last steps",
    )
    decay_steps: int | None = option(None, "step at which min_lr is reached; null means train.steps", ge=1)
    wsd_decay: Literal["linear", "1-sqrt", "cosine"] = option("1-sqrt", "with schedule=wsd: shape of the decay")
    wsd_decay_steps: int | None = option(
        None, "with schedule=wsd: steps of the decay; null means a fifth of the steps until min_lr is reached", ge=1
    )
    weight_decay: float = option(0.01, "decoupled weight decay of matrices", ge=0)
    groups: list[ParameterGroup] = option(
        [],
        "[{match: PATTERN, lr: 1.0, weight_decay: null}]: factor of the learning rate and weight decay by pattern of"
        " parameter names; of several that match the first counts",
    )
    betas: tuple[float, float] = option((0.9, 0.95), "Adam's betas")
    eps: float = option(1e-8, "Adam's epsilon", gt=0)
    kernel: Literal["auto", "torch", "apex", "deepspeed"] = option(
        "auto", "whose AdamW kernel runs; auto: NVIDIA's apex where it is installed, else torch's fused one"
    )
    muon_momentum: float = option(0.95, "with name=muon: momentum of the matrices' gradients, Nesterov's", ge=0, lt=1)
    muon_steps: int = option(5, "with name=muon: Newton-Schulz iterations", ge=1, le=20)
    muon_scale: Literal["rms", "shape"] = option(
        "rms",
        "with name=muon, factor of the learning rate for a matrix: rms: 0.2 sqrt(larger side), so that lr and"
        " weight_decay are AdamW's; shape: sqrt(max(1, rows / columns)), with lr near 0.02 and groups for the others",
    )
    ema_decay: float | None = option(
        None,
        "decay of an exponential moving average of the weights, such as 0.999, kept in float32 and in full checkpoints,"
        " for evaluation and export with --ema; null: none",
        gt=0,
        lt=1,
    )
    grad_clip: float = option(1.0, "largest global gradient norm; 0 turns clipping off", ge=0)

    @field_validator("betas")
    @classmethod
    def _betas_decay(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{list(betas)} must be in [0, 1)")
        return betas

    @model_validator(mode="after")
    def _schedule_fits(self) -> "OptimConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        if self.schedule == "constant" and self.decay_steps is not None:
            raise ValueError(
                f"decay_steps={self.decay_steps} with schedule=constant, which does not decay; remove it, or choose wsd"
            )
        if self.schedule != "wsd" and self.wsd_decay_steps is not None:
            raise ValueError(
                f"wsd_decay_steps={self.wsd_decay_steps} with schedule={self.schedule}; it belongs to schedule=wsd"
            )
        if self.name == "muon" and self.kernel not in ("auto", "torch"):
            raise ValueError(
                f"kernel={self.kernel} with name=muon: what steps AdamW's part beside Muon is torch's kernel; use"
                " kernel=auto"
            )
        return self
