"""Whether a checkpoint belongs to the run that wants to load it."""

from typing import Any

from megatron_taipan.config import Config
from megatron_taipan.errors import UserError
from megatron_taipan.pattern import parse_pattern

# Options that may change on a resume although they stand in a compared section: none of them changes a parameter, and
# the gate's threshold is an evaluation setting.
FREE = {"model.gate.threshold", "model.mamba.chunk_size"}


def identity(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run, by dotted name. The layout is free to change."""
    tree: dict[str, Any] = {"model": config.model.model_dump(mode="json")}
    tree["train"] = {"seed": config.train.seed, "precision": config.train.precision}
    tree["data"] = {
        "fingerprint": data_fingerprint,
        "seq_len": config.data.seq_len,
        "seed": config.data.seed,
        "mask_documents": config.data.mask_documents,
    }
    return {name: value for name, value in flatten(tree).items() if name not in FREE}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def differences(saved: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Every name whose value differs, as `name: checkpoint has X, this run Y`."""
    found = []
    for name in [*saved, *(n for n in ours if n not in saved)]:
        before, now = saved.get(name, "nothing"), ours.get(name, "nothing")
        if before != now and not (name == "model.pattern" and same_layers(before, now)):
            found.append(f"{name}: checkpoint has {before}, this run {now}")
    return found


def same_layers(before: str, now: str) -> bool:
    """Whether two patterns differ in spelling, or in where stages are cut, alone."""
    return parse_pattern(before).letters == parse_pattern(now).letters


def refuse_other_run(path: str, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises UserError, naming all differences, if the checkpoint is another run's."""
    found = differences(saved, ours)
    if found:
        raise UserError(
            f"checkpoint {path} belongs to another run: {'; '.join(found)}. Use the same settings, or start anew with"
            " another checkpoint.dir (or checkpoint.load=null in an empty one)"
        )
