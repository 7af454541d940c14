"""Options of the training itself: length, batch, precision, and what is watched on the way."""

from typing import Literal

from pydantic import model_validator

from megatron_taipan.section import Section, option


class ProfileConfig(Section):
    """Steps that are profiled; see train/profiling.py."""

    start: int = option(..., "first step of the trace, counted from 1 as in the log", ge=1)
    stop: int = option(..., "last step of the trace", ge=1)
    ranks: list[int] = option([0], "ranks that write one", min_length=1)
    memory: bool = option(True, "a snapshot of the GPU's memory as well")
    shapes: bool = option(False, "shapes of the operators' inputs")
    stacks: bool = option(False, "lines of Python that called them; slow")

    @model_validator(mode="after")
    def _in_order(self) -> "ProfileConfig":
        if self.stop < self.start:
            raise ValueError(f"stop={self.stop} is before start={self.start}")
        return self


class TrainConfig(Section):
    """How long, how much at once, in which precision."""

    steps: int = option(..., 'optimizer steps of the whole run; or tokens, such as "300B tokens"', ge=1)
    stop_at: int | None = option(None, "stop (with a checkpoint) after this step, the schedule unchanged", ge=1)
    global_batch: int = option(..., "samples per optimizer step over all ranks", ge=1)
    micro_batch: int = option(1, "samples per forward pass of one rank", ge=1)
    precision: Literal["bf16", "fp16", "fp32"] = option(
        "bf16", "compute precision; master weights and fp32 parameters are float32"
    )
    tf32: bool = option(True, "allow TensorFloat-32 products where the precision is fp32 (NVIDIA GPUs)")
    seed: int = option(1234, "seed of the initial weights and the gate's noise", ge=0)
    eval_every: int = option(500, "steps between validations; 0 validates at the end only", ge=0)
    eval_samples: int = option(64, "samples per validation", ge=1)
    deterministic: bool = option(False, "use deterministic algorithms only")
    cuda_graphs: bool | Literal["auto"] = option(
        "auto",
        "replay the layers as CUDA graphs where that is possible (no pipeline, zero_stage 1, bf16 or fp16); auto: not"
        " for micro-batches so long that graphs save no time and only hold memory",
    )
    profile: ProfileConfig | None = option(
        None,
        "{start: N, stop: M}: a trace of these steps and a memory snapshot in checkpoint.dir/profile; more there:"
        " ranks [0], memory true, shapes false, stacks false",
    )
    max_skipped: int = option(20, "steps in a row with a non-finite loss or gradient after which the run stops", ge=1)
    spike_z: float | None = option(
        None,
        "warn when a step's loss is this many standard deviations above the mean of the last spike_window; null: never",
        gt=0,
    )
    spike_window: int = option(128, "steps of that mean and deviation", ge=2)
    spike_rewind: bool = option(
        False, "after a spike go back to the newest checkpoint and continue there, past the samples drawn since"
    )
    spike_max_rewinds: int = option(10, "rewinds after which a spike ends the run", ge=1)
    hang_after_s: float = option(
        1200.0,
        "seconds without a finished step after which all stacks are printed and the run ends; below parallel.timeout_s,"
        " so that the rank that hangs still prints its own; 0: never",
        ge=0,
    )
