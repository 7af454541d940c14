"""Carrying weights from one network into another: the k-th layer of a letter takes the k-th of that letter.

What the source does not have is initialized from (seed, name); what the target does not have is left out; both are
reported. A tensor that both have with different shapes is an error, because half a warm start is of no use.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.checksums import write_sums
from checkpoints.export_files import note, write_json
from checkpoints.safetensors_files import write_sharded
from checkpoints.whole_folder import remove_or_restore_leftovers, whole_folder
from megatron_taipan.checkpoint.weights import PREFIX, open_export
from megatron_taipan.errors import UserError, refuse_other_encodings
from megatron_taipan.layer_kinds.registry import kinds_of
from megatron_taipan.model.init import initial_value
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parameters import parameter_table


@dataclass
class Source:
    """Weights under our names."""

    letters: str  # one a layer
    shapes: dict[str, tuple[int, ...]]
    load: Callable[[str], Tensor]
    # Compares the source's network, its weights given by a function, with another implementation; a line for the user.
    check: Callable[[Callable[[str], Tensor]], str] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What became of every tensor: `taken` and `new` by the target's names, `left` by the source's."""

    target: dict[str, tuple[int, ...]]  # shapes
    source: dict[str, tuple[int, ...]]
    taken: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """A few lines for the user; layers that were treated alike share a line."""
        lines = []
        parts = [("taken", self.taken, self.target), ("new", self.new, self.target)]
        for label, names, shapes in [*parts, ("left in the source", self.left, self.source)]:
            size = sum(torch.Size(shapes[name]).numel() for name in names)
            lines.append(f"{label}: {len(names)} tensors" + (f", {size:,} elements" if size else ""))
            lines += [f"    {group}" for group in group_layers(names)]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def map_weights(target: ModelConfig, source: Source, out: Path, seed: int) -> Report:
    """Writes a folder of weights for `target` that `checkpoint.init` reads; it appears whole, or not at all.

    Raises:
        UserError: `out` exists, shapes disagree, nothing could be taken, or the source's check fails.
    """
    refuse_other_encodings(out)
    out = out.resolve()
    for sentence in remove_or_restore_leftovers(out):
        note(sentence)
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    names, table = match_layers(target.letters, source.letters), parameter_table(target)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Taipan(target).state_dict().items()}
    report = Report(shapes, source.shapes, notes=[*source.notes])
    where = {name: rename(name, names) for name in shapes}
    for name, shape in shapes.items():
        theirs = source.shapes.get(where[name] or "")
        if theirs is None:
            report.new.append(name)
        elif theirs == shape or _more_rows(name, theirs, shape):
            report.taken.append(name)
            if theirs != shape:
                report.notes.append(
                    f"{name}: the first {shape[0]} of {theirs[0]} rows; ids from {shape[0]} on are dropped"
                )
        else:
            raise UserError(
                f"{name} has shape {list(shape)} in the target, {list(theirs)} in the source ({where[name]}); set the"
                " model's sizes to the source's"
            )
    if not report.taken:
        raise UserError(
            f"nothing fits: the source has the layers {source.letters}, the target {target.letters} and no name agrees"
        )
    used = {where[name] for name in report.taken}
    report.left = [name for name in source.shapes if name not in used]

    def load(stored: str) -> Tensor:
        name = stored.removeprefix(PREFIX)
        if name in report.new:
            if name in table:
                return initial_value(name, table[name], target, seed)
            return torch.tensor(target.gate.threshold)  # the only buffer there is
        return source.load(where[name] or "")[: shapes[name][0]] if shapes[name] else source.load(where[name] or "")

    with whole_folder(out) as work:
        write_json(work / "config.json", {"model_type": "taipan", "network": target.model_dump(mode="json")})
        write_sharded(work, {PREFIX + name: (shape, torch.float32) for name, shape in shapes.items()}, load)
        if source.check is not None:
            written = _as_written(work, source, {where[name] or "": name for name in report.taken})
            report.notes.append(source.check(written))
        write_sums(work)
    return report


def other_options(source: ModelConfig, target: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Options that change what a layer of the source computes and differ in the target: theirs and ours.

    Only layers of kinds that both have matter. Vocabulary and head are compared by their tensors.
    """
    both = "".join(set(source.letters) & set(target.letters))
    names = dict.fromkeys(["d_model", "norm_eps", *(name for kind in kinds_of(both) for name in kind.options)])
    values = {name: (attrgetter(name)(source), attrgetter(name)(target)) for name in names}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def refuse_other_options(folder: Path, source: ModelConfig, target: ModelConfig) -> None:
    """
    Raises:
        UserError: the same weights would compute something else in the target; it names the options.
    """
    other = other_options(source, target)
    if other:
        theirs = ", ".join(f"{name}={pair[0]}" for name, pair in other.items())
        ours = ", ".join(str(pair[1]) for pair in other.values())
        raise UserError(f"{folder} has {theirs}; the target has {ours}. Set the model's options to the source's")


def match_layers(target: str, source: str) -> dict[int, int]:
    """Layer of the target to layer of the source: the k-th of each letter, as long as the source has one."""
    places: dict[str, list[int]] = {}
    for index, letter in enumerate(source):
        places.setdefault(letter, []).append(index)
    matched = {}
    for index, letter in enumerate(target):
        if places.get(letter):
            matched[index] = places[letter].pop(0)
    return matched


def rename(name: str, layers: dict[int, int]) -> str | None:
    """The name that a target's tensor has in the source; None where the source has no such layer."""
    if not name.startswith("layers."):
        return name
    _, index, rest = name.split(".", 2)
    return f"layers.{layers[int(index)]}.{rest}" if int(index) in layers else None


def group_layers(names: list[str]) -> list[str]:
    """`layers.0.norm.weight`, `layers.2.norm.weight` -> `layers.{0,2}: norm.weight`; others as they are."""
    parts: dict[int, list[str]] = {}
    lines = []
    for name in names:
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            parts.setdefault(int(number), []).append(rest)
        else:
            lines.append(name)
    alike: dict[tuple[str, ...], list[int]] = {}
    for index, rests in parts.items():
        alike.setdefault(tuple(rests), []).append(index)
    return lines + [f"layers.{{{','.join(map(str, at))}}}: {', '.join(rests)}" for rests, at in alike.items()]


def _as_written(folder: Path, source: Source, taken: dict[str, str]) -> Callable[[str], Tensor]:
    """The source's tensors by its names: what was taken, as the written files have it, and the rest as it is.

    Args:
        taken: name in the source to name in the folder.
    """
    written = open_export(folder)
    return lambda name: written.load(taken[name]) if name in taken else source.load(name)


def _more_rows(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    """Vocabularies are often padded: rows beyond the target's are dropped."""
    return name in ("embedding.weight", "head.weight") and theirs[1:] == ours[1:] and theirs[0] > ours[0]
