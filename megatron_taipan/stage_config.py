"""The options of one stage of a run: its length, and what differs in it from the rest of the configuration."""

from typing import Any, Literal

from megatron_taipan.gate_config import Scheduled
from megatron_taipan.section import Section, option


class StageData(Section):
    """What of `data` may differ."""

    train: Any = option(None, "as data.train")
    seq_len: int | None = option(None, "as data.seq_len", ge=1)
    one_document: bool | None = option(None, "as data.one_document")
    mask_documents: bool | None = option(None, "as data.mask_documents")


class StageOptim(Section):
    """What of `optim` may differ. With any of them the learning rate counts from the stage's first step."""

    lr: float | None = option(None, "as optim.lr", gt=0)
    min_lr: float | None = option(None, "as optim.min_lr", ge=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] | None = option(None, "as optim.schedule")
    warmup_steps: int | None = option(None, "as optim.warmup_steps; 0 in later stages unless they give it", ge=0)
    decay_steps: int | None = option(None, "step of the stage at which min_lr is reached; null means its last", ge=1)
    wsd_decay: Literal["linear", "1-sqrt", "cosine"] | None = option(None, "as optim.wsd_decay")
    wsd_decay_steps: int | None = option(None, "as optim.wsd_decay_steps, of the stage", ge=1)


class StageTrain(Section):
    """What of `train` may differ."""

    global_batch: int | None = option(None, "as train.global_batch", ge=1)
    micro_batch: int | None = option(None, "as train.micro_batch", ge=1)


class StageGate(Section):
    """What of `model.gate` may differ. A schedule that is given here counts from the stage's first step."""

    capacity: Scheduled | None = option(None, "as model.gate.capacity")
    tau: Scheduled | None = option(None, "as model.gate.tau")
    budget_lambda: Scheduled | None = option(None, "as model.gate.budget_lambda")
    gradient_share: Scheduled | None = option(None, "as model.gate.gradient_share")


class StageModel(Section):
    """What of `model` may differ."""

    gate: StageGate = option(StageGate(), "the gate's schedules")


class StageParallel(Section):
    """What of `parallel` may differ."""

    context: int | None = option(None, "as parallel.context", ge=1)
    recompute: Literal["none", "selective", "full"] | None = option(None, "as parallel.recompute")
    recompute_every: int | None = option(None, "as parallel.recompute_every", ge=1)


class StageConfig(Section):
    """One stage; null: as in the rest of the configuration. megatron_taipan/stages.py puts them together."""

    name: str | None = option(None, "for logs; null: its number")
    steps: int | None = option(
        None, 'optimizer steps, or tokens such as "2B tokens"; null, in the last one: what is left of train.steps', ge=1
    )
    data: StageData = option(StageData(), "data")
    optim: StageOptim = option(StageOptim(), "learning rate")
    train: StageTrain = option(StageTrain(), "batch")
    model: StageModel = option(StageModel(), "schedules of the gate")
    parallel: StageParallel = option(StageParallel(), "recomputation, and over how many ranks rows are shared out")
