"""The configuration: one typed tree, read from YAML with dotted overrides (`train.steps=100`).

The description of each option says what it means; `--help` prints it. Unknown keys are refused with the nearest known
name; combinations that cannot work are refused with the arithmetic.
"""

import difflib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError, ValidationInfo, field_validator, model_validator

from megatron_taipan.errors import UserError
from megatron_taipan.gate_config import SCHEDULED_TAGS
from megatron_taipan.lengths import lengths_in_steps
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.plain_yaml import LONGEST_YAML, parse_yaml
from megatron_taipan.section import Section, option
from megatron_taipan.stage_config import StageConfig
from megatron_taipan.stages import plan_stages, run_length
from megatron_taipan.task_config import TaskConfig, meaning_of_tasks


class ConfigError(UserError):
    """The configuration is wrong; the message names the key and the numbers."""


class ParallelConfig(Section):
    """How the work is spread; the data-parallel size is the number of processes divided by the other sizes."""

    tensor: int = option(1, "tensor-parallel size", ge=1)
    pipeline: int = option(1, "pipeline-parallel size", ge=1)
    context: int = option(
        1, "context-parallel size: each rank holds one of so many consecutive pieces of every row of data.seq_len", ge=1
    )
    sequence: bool | None = option(
        None,
        "sequence parallelism: norms and residuals on one share of the tokens a tensor rank; null: where tensor divides"
        " data.seq_len, since it is faster and needs less memory",
    )
    overlap: bool = option(
        True,
        "with sequence: tokens are exchanged in chunks, overlapped with the matrix products; between GPUs of one host"
        " through their memory",
    )
    zero_stage: Literal[0, 1, 2, 3] = option(1, "DeepSpeed ZeRO stage")
    offload_optimizer: Literal["none", "cpu", "nvme"] = option(
        "none", "where ZeRO keeps the optimizer state; nvme is refused"
    )
    offload_param: Literal["none", "cpu", "nvme"] = option("none", "where ZeRO-3 keeps parameters; nvme is refused")
    nvme_path: str | None = option(
        None, "kept so that files of earlier runs are read; without effect, since nvme is refused"
    )
    recompute: Literal["none", "selective", "full"] = option(
        "none",
        "activation checkpointing: selective recomputes norms, conv, scan and attention; full recomputes whole layers",
    )
    recompute_every: int = option(1, "with recompute=full: layers per checkpointed segment", ge=1)
    recompute_mixer: list[Literal["conv", "states"]] = option(
        ["states"],
        "with recompute=none: what Mamba-2 layers compute again inside their fused backward pass: [states], most of the"
        " scan's states; [states, conv] also the convolution's output, for less memory still; []: nothing, the fastest",
    )
    timeout_s: float = option(1800.0, "seconds after which a collective that does not finish ends the job", gt=0)

    def piece(self, seq_len: int) -> int:
        """Tokens of a row of seq_len that one rank holds."""
        return seq_len // self.context

    def shards_tokens(self, seq_len: int) -> bool:
        """Whether tensor ranks keep a share of the tokens each, in rows of seq_len tokens."""
        if self.sequence is None:
            return self.tensor > 1 and self.piece(seq_len) % self.tensor == 0
        return self.sequence and self.tensor > 1


class DataSource(Section):
    """One tokenized dataset of a blend."""

    prefix: str = option(
        ...,
        "path of the .bin/.idx pair without its ending, of the shards of one output without -00000, or a glob over"
        " prefixes",
    )
    weight: float | Literal["tokens"] = option(
        1.0, "share of the blend, relative to the others; tokens: by size, for all sources or none"
    )
    loss_mask: Literal["auto", "require", "ignore"] = option(
        "auto",
        "auto: only the tokens that PREFIX_loss_mask marks are learned, all where there is none; require: an error"
        " where there is none; ignore: all are learned",
    )

    set: str | None = option(None, "of data.valid: the named set that it belongs to")

    @field_validator("weight", mode="before")
    @classmethod
    def _positive(cls, weight: Any) -> Any:
        """Checked here, since pydantic would report a fault of a union twice."""
        if weight == "tokens":
            return weight
        try:
            number = float(weight)
        except (TypeError, ValueError):
            raise ValueError(f"{weight!r} is neither a number nor `tokens` (by size)") from None
        if not 0 < number < float("inf"):
            raise ValueError(f"{weight} must be above 0 and finite")
        return number


class DataConfig(Section):
    """What is read, and in which order."""

    train: list[DataSource] = option(
        ...,
        "tokenized datasets to train on: a prefix, or a list of prefixes or of {prefix: P, weight: 1.0, loss_mask:"
        " auto}; {prefix: [P, Q], weight: tokens} weights a list by size; the shards of one output are one source, by"
        " its prefix or a glob; auto: where PREFIX_loss_mask.idx exists only the tokens that it marks are learned;"
        " require: it must exist; ignore: all tokens are learned",
        min_length=1,
    )
    valid: list[DataSource] | None = option(
        None,
        "datasets to validate on, as for train; {wiki: P, code: [Q, R]}: sets by name, each with its own curve; null"
        " takes valid_fraction of each of train",
        min_length=1,
    )
    valid_fraction: float = option(0.02, "documents held out for validation when data.valid is null", ge=0, lt=1)
    seq_len: int = option(4096, "tokens per sample", ge=1)
    seed: int = option(1234, "seed of the sample order", ge=0)
    tokenizer: str | None = option(None, "tokenizer file that the data was made with; copied into exports")
    mask_documents: bool = option(True, "documents packed into one sample never see each other (seq_idx)")
    one_document: bool = option(
        False, "every sample is inside one document of more than seq_len tokens; shorter ones are left out"
    )
    verify: bool = option(
        False,
        "read every byte of the data before the run and compare it with the checksums in the manifests; the files are"
        " spread over all ranks",
    )
    workers: int = option(0, "loader processes per rank; 0 loads in the training process", ge=0)

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _short_forms(cls, value: Any, info: ValidationInfo) -> Any:
        """A path, or a list of paths, means sources of equal weight, {prefix: [P, Q], weight: tokens} several by
        size, {name: P} of data.valid named sets."""
        if isinstance(value, dict) and "prefix" not in value:
            if info.field_name == "train":
                raise ValueError(f"{value!r} has no prefix; give the path of a .bin/.idx pair, or a list of them")
            return [{"set": name, **one} for name, given in value.items() for one in cls._short_forms(given, info)]
        if isinstance(value, str | dict):
            value = [value]
        if isinstance(value, list):
            value = [{"prefix": v} if isinstance(v, str) else v for v in value]
            value = [one for v in value for one in _spread(v)]
        return value

    @model_validator(mode="after")
    def _all_named_or_none(self) -> "DataConfig":
        if named := [source.prefix for source in self.train if source.set is not None]:
            raise ValueError(f"train: {named[0]} has a set, which only sources of data.valid have; remove it")
        unnamed = [source.prefix for source in self.valid or [] if source.set is None]
        if unnamed and len(unnamed) < len(self.valid or []):
            raise ValueError(f"valid: {unnamed[0]} belongs to no set and others do; give {{name: prefix}} for all")
        return self

    def valid_sets(self) -> dict[str | None, "DataConfig"]:
        """For each set of data.valid by name, the data with that set as its data.valid; else {None: the data}."""
        names = dict.fromkeys(source.set for source in self.valid or [])
        if not names or None in names:  # all sources are named, or none is
            return {None: self}
        return {
            name: self.model_copy(update={"valid": [s for s in self.valid or [] if s.set == name]}) for name in names
        }

    @field_validator("train", "valid")
    @classmethod
    def _one_measure(cls, sources: list[DataSource] | None) -> list[DataSource] | None:
        for name in dict.fromkeys(source.set for source in sources or []):
            blend = [source for source in sources or [] if source.set == name]
            by_size = [source for source in blend if source.weight == "tokens"]
            if by_size and len(by_size) < len(blend):
                raise ValueError(
                    f"{len(by_size)} of {len(blend)} sources have weight: tokens (the first is {by_size[0].prefix})"
                    " and the others a number, which cannot be compared: give all of them `tokens`, or all a number"
                )
        return sources


def _spread(source: Any) -> list[Any]:
    """The sources of an entry whose prefix is a list; they must be weighted by size, since a number could be the weight
    of each or of all."""
    if not isinstance(source, dict) or not isinstance(source.get("prefix"), list):
        return [source]
    if source.get("weight") != "tokens":
        raise ValueError("a list of prefixes in one entry needs weight: tokens; give each its own entry and weight")
    return [source | {"prefix": prefix} for prefix in source["prefix"]]


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


class CheckpointConfig(Section):
    """Saving and resuming."""

    dir: str = option(..., "folder of this run's checkpoints")
    save_every: int = option(1000, "steps between full checkpoints; 0 saves at the end only", ge=0)
    load: str | None = option(
        "auto",
        "auto: resume from checkpoint.dir if it holds one; null: start from scratch; a folder: as auto, but while"
        " checkpoint.dir holds none start from that folder's newest",
    )
    init: str | None = option(
        None,
        "weights that a new run starts from: an export, an import, or a checkpoint of any run and layout; ignored once"
        " the run has a checkpoint",
    )
    save_weights_every: int = option(
        0, "steps between saves of the weights alone (a third of the size; for export and evaluation); 0: never", ge=0
    )
    keep_last_weights: int | None = option(None, "newest weights-only saves that are kept; null keeps all", ge=1)
    save_minutes: float | None = option(None, "save as well when this many minutes have passed since the last", gt=0)
    retry_s: float = option(60.0, "seconds after which a checkpoint that could not be written is tried again", gt=0)
    last_tries: int = option(10, "tries for the checkpoint at a run's end before it gives up with status 74", ge=1)
    asynchronous: bool = option(True, "write checkpoints in the background: training stops only to copy the state")
    keep_last: int | None = option(None, "newest full checkpoints that are kept; null keeps all", ge=1)
    keep_every: int | None = option(None, "checkpoints at multiples of this many steps are never deleted", ge=1)


class LogConfig(Section):
    """What is logged during a run."""

    every: int = option(10, "steps between log lines", ge=1)
    tensorboard: bool = option(True, "write TensorBoard events to checkpoint.dir/tensorboard")
    wandb: bool = option(False, "send the same curves to Weights & Biases (package wandb; WANDB_MODE=offline works)")
    wandb_project: str = option("megatron-taipan", "project of log.wandb")
    text_mb: float = option(
        10.0,
        "size at which a rank's text file, checkpoint.dir/logs/rank_00000.log and so on, is rotated; 0: none",
        ge=0,
    )
    text_files: int = option(3, "old text files that each rank keeps", ge=1)
    progress: bool = option(True, "progress bar on rank 0 when stderr is a terminal, plain lines elsewhere")
    peak_tflops: float | None = option(
        None, "peak TFLOP/s of one device in the precision used, for MFU; null looks up 16 bits of known GPUs", gt=0
    )


OwnKernel = Literal["auto", "triton", "reference"]


class OpsConfig(Section):
    """Which implementation of each operation runs; in all options but the first, auto means: as ops.backend says, and
    for layers A what the option of attention adds."""

    backend: Literal["auto", "reference", "fast"] = option(
        "auto",
        "default of the other options; auto: this project's kernels where they run; reference: plain torch; fast:"
        " refuse to start without kernels",
    )
    ssd: Literal["auto", "triton", "mamba_ssm", "reference"] = option(
        "auto", "the scan of M layers; mamba_ssm: its scan alone, between our convolution and norm"
    )
    conv: Literal["auto", "triton", "causal_conv1d", "reference"] = option("auto", "the short convolution of M layers")
    attention: Literal["auto", "triton", "flash_attn", "sdpa", "reference"] = option(
        "auto",
        "attention; flash_attn and sdpa (torch's, cuDNN's kernel first) for layers W and A, never for the selected"
        " queries of S; sdpa for A with one document a row, and auto's choice there",
    )
    cross_entropy: Literal["auto", "triton", "liger", "cce", "reference"] = option(
        "auto", "head and cross entropy; liger: its fused linear cross entropy; cce: cut-cross-entropy"
    )
    norm: OwnKernel = option("auto", "norms of the residual stream and the additions to it")
    gated_norm: OwnKernel = option("auto", "the gated norm of M layers")
    rope: OwnKernel = option("auto", "the rotary embedding of A layers")
    swiglu: OwnKernel = option("auto", "the product inside SwiGLU")
    selection: OwnKernel = option(
        "auto",
        "picking the tokens that attend in S layers, and putting them back; as kernels also all queries of gradient=all"
        " in one call",
    )
    gate: OwnKernel = option("auto", "logits and noise of the gate of S layers")

    def choices(self) -> dict[str, str]:
        """What each option but `backend` says."""
        return self.model_dump(exclude={"backend"})


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


def presets() -> Path:
    """The folder of the presets: launch/configs of a checkout, which a wheel puts into the package."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "launch" / "configs"


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file and applies dotted overrides such as `train.steps=100` (values are YAML).

    A file may extend another, `extends: other.yaml` (a path from its own folder), and then holds only what differs.
    Mappings are merged option by option, everything else is replaced.

    Raises:
        ConfigError: the file or one that it extends is missing or not a mapping, files extend each other in a circle,
            a key is unknown, a value does not fit.
    """
    tree = _read_tree(Path(path), ())
    for override in overrides:
        _apply_override(tree, override)
    return make_config(tree, str(path))


def refuse_unexpanded(config: Config) -> None:
    """A folder of checkpoints as only a shell would read it; what is read from such a path is missing and says so.

    Raises:
        ConfigError: checkpoint.dir begins with `~` or `$NAME`: the run would be saved in a folder of that name.
    """
    folder = config.checkpoint.dir
    if found := re.match(r"~|\$\w+|\$\{\w+\}", folder):
        raise ConfigError(
            f"checkpoint.dir={folder}: {found[0]} is not replaced here, nor by a shell within an override; write the"
            f' path out, or on the command line checkpoint.dir="$HOME/..." (a folder of that name: ./{folder})'
        )


def _read_tree(path: Path, extended_by: tuple[Path, ...]) -> dict:
    """The mapping of a file, merged into what it extends."""
    where = "".join(f" (extended by {file})" for file in reversed(extended_by))
    if path.resolve() in {file.resolve() for file in extended_by}:
        raise ConfigError(f"{path} extends itself: {' -> '.join(map(str, (*extended_by, path)))}")
    try:
        with open(path, encoding="utf-8") as file:
            tree = parse_yaml(file.read(LONGEST_YAML + 1))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {path}{where} is not text: {error}") from error
    except ValueError as error:
        raise ConfigError(f"the configuration {path}{where} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}{where} must hold a mapping of sections (model, data, train, ...)")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends={base!r} must be the path of one file")
    return _merged(_read_tree(path.parent / base, (*extended_by, path)), tree)


def _merged(base: dict, tree: dict) -> dict:
    """`tree` merged into `base`, mappings recursively."""
    both = {k: _merged(base[k], v) for k, v in tree.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | tree | both


def make_config(tree: dict, origin: str = "configuration") -> Config:
    """Validates a nested dictionary; `origin` is named in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(error)}") from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every option spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_options(section: type[Section] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every option as (dotted name, default, meaning), in order, for `--help`."""
    rows = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            rows += describe_options(inner, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else yaml_text(field.default)
            rows.append((prefix + name, default, field.description or ""))
    return rows


def yaml_text(value: Any) -> str:
    """A value as YAML, on one line."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True).replace("...", "").strip()


def _apply_override(tree: dict, override: str) -> None:
    """Sets one dotted key in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must have the form section.key=value, as in train.steps=100")
    *parents, last = key.split(".")
    node = tree
    for depth, parent in enumerate(parents, 1):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            option = ".".join(parents[:depth])
            raise ConfigError(
                f"override {override!r}: {option} is a value, not a section; give all of it: {option}=..."
            )
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"override {override[:200]!r}: {error}") from error
    for found in re.finditer(r"\s#", text):
        with suppress(ValueError):  # cut within quotes
            if parse_yaml(text[: found.start()]) == value:  # `runs/try #2` would be `runs/try`
                raise ConfigError(
                    f"override {override[:200]!r}: what follows {found[0]!r} is a comment in YAML; quote the value,"
                    f" {key}='\"...\"', or leave the comment out"
                )
    node[last] = _number(value)


def _number(value: Any) -> Any:
    """YAML reads 5e-4 as text; pydantic would accept it for a float, so only exponents are converted here."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError) -> str:
    """All faults on one line, each with its dotted key, unknown keys with the nearest known one."""
    faults = []
    for fault in error.errors():
        location = tuple(part for part in fault["loc"] if part not in SCHEDULED_TAGS)
        where = ".".join(str(part) for part in location)
        if fault["type"] == "extra_forbidden":
            faults.append(f"unknown key {where!r}{_nearest(location)}")
        elif fault["type"] == "missing":
            faults.append(f"{where} is required")
        elif fault["type"] == "value_error":
            faults.append(f"{where + ': ' if where else ''}{fault['ctx']['error']}")
        else:
            faults.append(f"{where}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return "; ".join(faults)


def _section_of(annotation: Any) -> Any:
    """The section in `Section | None` or in a number that may be a schedule; anything else as it is."""
    inner = [a for arg in get_args(annotation) for a in (arg, *get_args(arg))]
    return next((a for a in inner if isinstance(a, type) and issubclass(a, Section)), annotation)


def _nearest(location: tuple) -> str:
    """`; did you mean train.steps?` where a known name is near, else the names known there."""
    section: Any = Config
    for part in location[:-1]:
        if isinstance(part, int):  # in a list, whose section is known already
            continue
        field = getattr(section, "model_fields", {}).get(part)
        section = _section_of(field.annotation) if field else section
        if not (isinstance(section, type) and issubclass(section, Section)):
            section = DataSource  # short forms of data hold nothing else
    known = list(section.model_fields)
    prefix = ".".join(str(part) for part in location[:-1])
    prefix = prefix + "." if prefix else ""
    near = difflib.get_close_matches(str(location[-1]), known, 1, 0.5)
    if near:
        return f"; did you mean {prefix}{near[0]!r}?".replace("'", "")
    elsewhere = [name for name, _, _ in describe_options() if name.split(".")[-1] == location[-1]]
    if elsewhere:
        return f"; it belongs at {elsewhere[0]}"
    return f"; known there: {', '.join(known)}"
