"""What a checkpoint's metadata.json says: how far the run had come, and which run it is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_taipan.checkpoint.folder import FORMAT, METADATA
from megatron_taipan.config import Config
from megatron_taipan.config_text import yaml_text
from megatron_taipan.errors import UserError
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.pattern import parse_pattern
from megatron_taipan.section import Section, faults
from megatron_taipan.untrusted import parse_json

Count = Annotated[int, Field(ge=0)]

# Options that may change on a resume although they are in a compared section: none of them changes a parameter or
# what the trained network computes. The gate's threshold is an evaluation setting; the others say how gates are
# trained. What has changed is reported (`changed_settings`).
SCHEDULED = ("model.gate.capacity", "model.gate.tau", "model.gate.budget_lambda", "model.gate.gradient_share")
TRAINING = (
    *SCHEDULED,
    *(f"model.gate.{name}" for name in ("budget", "input_gradient", "estimator", "gradient")),
)
FREE_ON_RESUME = ("model.gate.threshold", "model.mamba.chunk_size", *TRAINING)


@dataclass
class Progress:
    """How far a run has come: the learning rate, the order of samples and the gate's noise are pure functions of these
    counters and of seeds."""

    # checked when it is read from a file
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    step: Count = 0  # optimizer steps taken, skipped ones included
    samples: Count = 0  # samples consumed: the loader's place
    tokens: Count = 0  # tokens consumed, masked ones included
    skipped: Count = 0  # steps skipped because of a non-finite loss or gradient
    recent: list[float] = field(default_factory=list)  # the last losses, where spikes are looked for (train/spikes.py)
    run_steps: Count = 0  # train.steps when the run began: what the fractions in schedules are of
    shares: list[float] = field(default_factory=list)  # selected by each gate in the last step, for budget=batch
    rewinds: list[dict[str, Any]] = field(default_factory=list)  # each: from which step to which, samples passed over
    finished: list[dict[str, Any]] = field(default_factory=list)  # stages that are done, see checkpoint/stages.py


class _Metadata(BaseModel):
    """What the fields that are read have to be; others may be there too."""

    model_config = ConfigDict(strict=True)

    progress: Progress
    identity: dict[str, Any]
    layout: dict[str, Any] = {}
    versions: dict[str, Any] = {}


def read_metadata(path: Path) -> dict[str, Any]:
    """What `metadata.json` holds.

    Raises:
        UserError: it is missing, damaged, of another format version, or a field is of another type.
    """
    try:
        raw = (path / METADATA).read_bytes()
        metadata = parse_json(raw)
    except (OSError, ValueError) as error:
        raise UserError(f"{path / METADATA} cannot be read: {error}") from error
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has checkpoint format {found}; this version reads format {FORMAT}")
    try:
        _Metadata.model_validate_json(raw)
    except ValidationError as error:
        raise UserError(f"{path / METADATA} is damaged: {faults(error)}") from error
    return metadata


def identity(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run, by dotted name. The layout is free to change."""
    tree: dict[str, Any] = {}
    tree["train"] = {"seed": config.train.seed, "precision": config.train.precision}
    tree["data"] = {
        "fingerprint": data_fingerprint,
        "seq_len": config.data.seq_len,
        "seed": config.data.seed,
        "mask_documents": config.data.mask_documents,
    }
    return network_settings(config.model) | dotted_settings(tree)


def network_settings(model: ModelConfig) -> dict[str, Any]:
    """What decides about the parameters and about what the network computes with them, by dotted name."""
    flat = dotted_settings({"model": model.model_dump(mode="json")})
    return {name: value for name, value in flat.items() if not is_free(name)}


def is_free(name: str) -> bool:
    """Whether an option, or a part of its schedule, may change on a resume."""
    return any(name == free or name.startswith(free + ".") for free in FREE_ON_RESUME)


def changed_settings(saved: Config, ours: Config) -> list[str]:
    """Every option that differs, as `name: X, this run Y`; a schedule is one option."""
    before, now = (dotted_settings(_numbered(c.model_dump(mode="json")), whole=SCHEDULED) for c in (saved, ours))
    changed = [name for name in [*before, *(n for n in now if n not in before)] if before.get(name) != now.get(name)]
    return [f"{name}: {yaml_text(before.get(name))}, this run {yaml_text(now.get(name))}" for name in changed]


def _numbered(tree: dict[str, Any]) -> dict[str, Any]:
    """The configuration with its stages by number, as `explain` of config_errors.py names them in errors."""
    return tree | {"stages": {str(number): stage for number, stage in enumerate(tree["stages"])}}


def dotted_settings(tree: dict[str, Any], prefix: str = "", whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """A nested dictionary with dotted names; those in `whole` are not taken apart."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        apart = isinstance(value, dict) and name not in whole
        flat |= dotted_settings(value, f"{name}.", whole) if apart else {name: value}
    return flat


def identity_differences(saved: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Every name whose value differs, as `name: checkpoint has X, this run Y`.

    A checkpoint from before an option of the network existed was made with what is its default now.
    """
    found = []
    fields = {name: field.default for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    plain = {name: d.model_dump(mode="json") if isinstance(d, Section) else d for name, d in fields.items()}
    saved = {name: d for name, d in dotted_settings({"model": plain}).items() if name in ours} | saved
    for name in [*saved, *(n for n in ours if n not in saved)]:
        if is_free(name):  # an older checkpoint names them
            continue
        before, now = saved.get(name, "nothing"), ours.get(name, "nothing")
        if before != now and not (name == "model.pattern" and same_layers(before, now)):
            found.append(f"{name}: checkpoint has {before}, this run {now}")
    return found


def same_layers(before: str, now: str) -> bool:
    """Whether two patterns differ only in spelling, or in where stages are cut."""
    return parse_pattern(before).letters == parse_pattern(now).letters


def refuse_other_run(path: str, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises UserError, naming all differences, if the checkpoint is another run's."""
    found = identity_differences(saved, ours)
    if found:
        raise UserError(
            f"checkpoint {path} belongs to another run: {'; '.join(found)}. Use the same settings, or start again with"
            " another checkpoint.dir (or checkpoint.load=null in an empty one)"
        )
