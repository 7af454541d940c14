"""The configuration: one typed tree, whose sections have a file each, `train` train_config.py.

The description of each option says what it means; `--help` prints it. Here is what sections need of each other:
combinations that cannot work are refused with the arithmetic. config_loading.py reads the tree from files.
"""

from typing import Any

from pydantic import model_validator

from megatron_taipan.checkpoint_config import CheckpointConfig
from megatron_taipan.data_config import DataConfig
from megatron_taipan.lengths import lengths_in_steps
from megatron_taipan.log_config import LogConfig
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.ops_config import OpsConfig
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.parallel_config import ParallelConfig
from megatron_taipan.section import Section, option
from megatron_taipan.stage_config import StageConfig
from megatron_taipan.stages import plan_stages, run_length
from megatron_taipan.task_config import TaskConfig, meaning_of_tasks
from megatron_taipan.train_config import TrainConfig


class Config(Section):
    """The whole configuration of a run."""

    name: str = option("taipan", "name of the run, used in logs and exports")
    model: ModelConfig = option(..., "the network")
    parallel: ParallelConfig = option(ParallelConfig(), "the layout")
    data: DataConfig = option(..., "the data")
    optim: OptimConfig = option(OptimConfig(), "the optimizer")
    train: TrainConfig = option(..., "the run")
    checkpoint: CheckpointConfig = option(..., "checkpoints")
    tasks: list[TaskConfig] = option([], meaning_of_tasks())
    log: LogConfig = option(LogConfig(), "logs")
    ops: OpsConfig = option(OpsConfig(), "implementations")
    stages: list[StageConfig] = option(
        [],
        "parts of the run one after the other, each {name: N, steps: 300, ...} with what differs in it: data (train,"
        " seq_len, one_document, mask_documents), optim (lr, min_lr, schedule and lengths), train (global_batch,"
        " micro_batch), model.gate (capacity, tau, budget_lambda, gradient_share), parallel (context, recompute,"
        " recompute_every)",
    )

    @model_validator(mode="before")
    @classmethod
    def _tokens_are_steps(cls, tree: Any) -> Any:
        return run_length(lengths_in_steps(tree, default_seq_len=DataConfig.model_fields["seq_len"].default))

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        t, p = self.train, self.parallel
        if t.global_batch % t.micro_batch:
            raise ValueError(
                f"train.micro_batch={t.micro_batch} does not divide train.global_batch={t.global_batch}"
                f" (remainder {t.global_batch % t.micro_batch})"
            )
        if t.precision != "fp32" and p.zero_stage == 0:
            raise ValueError(
                f"train.precision={t.precision} with parallel.zero_stage=0 trains wrongly in DeepSpeed (Adam takes a"
                " step on zero gradients at start); use zero_stage=1, which works on one process too"
            )
        if t.spike_rewind and t.spike_z is None:
            raise ValueError("train.spike_rewind=true needs train.spike_z, the size of a spike; 6 is a usual one")
        if p.pipeline > 1 and p.zero_stage > 1:
            raise ValueError(
                f"parallel.pipeline={p.pipeline} cannot run with zero_stage={p.zero_stage}: DeepSpeed's pipeline"
                " engine keeps whole gradients; use zero_stage 1"
            )
        if p.pipeline > 1 and p.zero_stage == 0:
            raise ValueError(
                f"parallel.pipeline={p.pipeline} with zero_stage=0: DeepSpeed's pipeline engine would ignore"
                " optim.grad_clip; use zero_stage 1"
            )
        if self.optim.name == "muon":
            self._check_muon()
        self._check_tasks()
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "Config":
        plan_stages(self)
        return self

    def _check_muon(self) -> None:
        p = self.parallel
        if self.model.mup_base_width is not None:
            raise ValueError(
                f"optim.name=muon with model.mup_base_width={self.model.mup_base_width}, whose learning rates are for"
                " AdamW; leave one of them out"
            )
        if p.zero_stage == 3:
            raise ValueError(
                "optim.name=muon with parallel.zero_stage=3, which steps slices of one parameter after another, and"
                " Muon needs whole matrices; use zero_stage 0, 1 or 2"
            )
        if p.offload_optimizer != "none":
            raise ValueError(
                f"optim.name=muon with parallel.offload_optimizer={p.offload_optimizer}: its matrix products would run"
                " on the CPU, where the optimizer's state is; use offload_optimizer=none"
            )

    def _check_tasks(self) -> None:
        """Their names differ, and there is a checkpoint at each turn; saves by the clock come at any step."""
        names = [task.name for task in self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two of tasks have the name {twice[0]}, which is the name of their folder: rename one")
        if self.checkpoint.save_minutes is None:
            for task in self.tasks:
                task.check_cadence(self.checkpoint.save_every, self.checkpoint.save_weights_every)
