"""Whether a training state can be gone on from: one with a value that is not finite never recovers."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_taipan.checkpoint.folder import STATE, Found, read_manifest, step_of
from megatron_taipan.checkpoint.reader import BLOCK
from megatron_taipan.checkpoint.verification import damage, first_without, newest_first
from megatron_taipan.data.share import share
from megatron_taipan.engine.protocol import Engine
from megatron_taipan.engine.state_shards import KINDS, held_shards
from megatron_taipan.parallel.all_ranks import gather_objects, this_rank, world_size


def held_state_is_finite(engine: Engine, zero_rank: int) -> bool:
    """Whether all parameters and moments that this rank updates are finite; it waits for the device."""
    extremes: list[Tensor] = []
    for shard in held_shards(engine, zero_rank):
        for kind in KINDS:
            extremes += torch.aminmax(shard.tensor(kind))  # one pass without a copy; NaN comes through
    return not extremes or bool(torch.stack([value.float() for value in extremes]).isfinite().all())


def newest_sound(directory: Path) -> Found | None:
    """The newest checkpoint of a run that is complete, unchanged and finite; collective, the same on every rank."""
    return first_without(lambda path: damage(path) or _not_finite(path), newest_first(directory))


def where_to_go_on(directory: Path, step: int) -> str:
    """Which checkpoint a run whose loss was last finite at `step` can go on from; collective."""
    sound = newest_sound(directory)
    if sound is None:
        return f"no checkpoint in {directory} is sound: start anew, in another checkpoint.dir or with this one emptied"
    unsound = "".join(f"; {text}: delete it, or a resume takes it" for text in sound.passed_over)
    last = "nothing was updated since, and " if step_of(sound.path) == step else ""
    return f"{last}{sound.path} is sound (complete, every value finite): the same command goes on from there{unsound}"


def _not_finite(path: Path) -> str | None:
    """What is not finite in a complete checkpoint, None if all is; the files are shared out over the ranks."""
    sizes = [(size, name) for name, (size, _) in read_manifest(path).items() if name.endswith(".safetensors")]
    names = [found for file in share(sizes, world_size(), this_rank()) if (found := _first_not_finite(path / file))]
    return next((name for answer in gather_objects(names) for name in answer), None)


def _first_not_finite(file: Path) -> str | None:
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():
                if name.rpartition("|")[2] in KINDS:
                    view = opened.get_slice(name)
                    (count,) = view.get_shape()  # a run of elements, see reader.py
                    for at in range(0, count, BLOCK):
                        if not np.isfinite(view[at : min(at + BLOCK, count)]).all():
                            return f"{name.replace('|', ' (')}) in {STATE}/{file.name} is not finite"
    except (SafetensorError, ValueError, TypeError) as error:
        return f"{STATE}/{file.name} is damaged: {error}"
    return None
