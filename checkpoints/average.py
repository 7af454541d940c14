"""`python -m checkpoints.average A B C OUT [--weights 1 1 2]`: the mean of the weights of several checkpoints.

Each is a checkpoint, or a run's folder for its newest; of any layout, full or weights only, of the same network. OUT
becomes a weights-only checkpoint of the mean: evaluate it, export it, or start a run with checkpoint.init=OUT. It has
no optimizer state, so no run resumes from it. Of the sources the last one named gives the configuration and the
counters; thresholds that were calibrated are not taken over: calibrate the mean.

Averages of checkpoints along a run, or of branches, are known to gain most of what a decay of the learning rate gains
(arXiv 2405.18392 section 4, 2203.05482). The sources are verified first; one tensor of each is in memory at a time.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from checkpoints.reshard import Target, with_layout, write_checkpoint
from megatron_taipan.checkpoint import folder
from megatron_taipan.checkpoint.metadata import dotted_settings, is_free, read_metadata
from megatron_taipan.checkpoint.reader import StateReader
from megatron_taipan.checkpoint.verification import refuse_damaged
from megatron_taipan.config_loading import load_config
from megatron_taipan.engine.state_shards import MASTER
from megatron_taipan.errors import UserError, writing
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.param_spec import ParamSpec
from megatron_taipan.programs import exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.average", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="checkpoints, or runs' folders (the newest of each)")
    parser.add_argument("out", type=Path, help="a new folder, the checkpoint of the mean")
    parser.add_argument("--weights", nargs="+", type=float, help="one for each, in that order; default: all the same")
    options = parser.parse_args(arguments)
    shares = shares_of(options.weights, len(options.checkpoints))
    sources = [folder.locate(str(path)) for path in options.checkpoints]
    for source in sources:
        refuse_damaged(source)
    with writing(options.out):
        average(sources, shares, options.out)
    for source, share in zip(sources, shares, strict=True):
        print(f"{share:>8.4f} of {source}")
    print(f"wrote {options.out}: weights only; evaluate, export, or begin a run with checkpoint.init={options.out}")
    return 0


def shares_of(weights: list[float] | None, count: int) -> list[float]:
    """Each checkpoint's share, together 1.

    Raises:
        UserError: there are fewer than two checkpoints, another number of weights, or one that is not above 0.
    """
    if count < 2:
        raise UserError(f"a mean takes at least two checkpoints, and then the folder to write; {count} was given")
    weights = weights or [1.0] * count
    if len(weights) != count:
        raise UserError(f"--weights has {len(weights)} numbers for {count} checkpoints; give one for each")
    for weight in weights:
        if not 0 < weight < math.inf:  # nan too
            raise UserError(f"--weights: {weight:g} is not a number above 0")
    largest = max(weights)  # the sum of large ones would overflow
    total = math.fsum(weight / largest for weight in weights)
    return [weight / largest / total for weight in weights]


@dataclass
class MeanReader:
    """Reads several states as one: the weighted mean of each tensor, summed in float64."""

    readers: list[StateReader]
    shares: list[float]

    def __post_init__(self) -> None:
        self.buffers = self.readers[-1].buffers
        self.optimizer_step = self.readers[-1].optimizer_step
        self.scaler: dict[str, int | float] | None = None

    def elements(self, name: str, kind: str, spec: ParamSpec, size: int, rank: int, start: int, count: int) -> Tensor:
        """See StateReader.elements."""
        return self._mean([r.elements(name, kind, spec, size, rank, start, count) for r in self.readers])

    def buffer(self, name: str) -> Tensor:
        """The mean of a buffer."""
        return self._mean([reader.buffer(name) for reader in self.readers])

    def random_states(self, rank: int) -> dict[str, Tensor]:
        """None: no run resumes from a mean."""
        return {}

    def _mean(self, tensors: list[Tensor]) -> Tensor:
        total = self.shares[0] * tensors[0].double()
        for share, tensor in zip(self.shares[1:], tensors[1:], strict=True):
            total.add_(tensor, alpha=share)
        return total.to(tensors[0].dtype)


def average(sources: list[Path], shares: list[float], out: Path) -> None:
    """Writes the mean of the checkpoints' weights as the checkpoint `out`.

    Raises:
        UserError: the networks differ, or the folder exists or has a name of a run's own checkpoints.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    if any(folder.step_of(out, kind) is not None for kind in (folder.FULL, folder.WEIGHTS)):
        raise UserError(f"{out} has the name of a run's own checkpoint, which a mean is not; choose another name")
    configs = [load_config(source / folder.CONFIG) for source in sources]
    for source, config in zip(sources, configs, strict=True):
        refuse_other_network(sources[-1], configs[-1].model, source, config.model)
    metadata = read_metadata(sources[-1])
    readers = [StateReader(source, config.model) for source, config in zip(sources, configs, strict=True)]
    made_of = [{"checkpoint": str(source), "share": share} for source, share in zip(sources, shares, strict=True)]
    target = Target(with_layout(configs[-1], {"tensor": 1, "pipeline": 1, "zero_stage": 1}), 1)
    about = metadata | {"contents": folder.WEIGHTS, "average_of": made_of}
    write_checkpoint(out, MeanReader(readers, shares), target, (MASTER,), about)


def refuse_other_network(first: Path, model: ModelConfig, second: Path, other: ModelConfig) -> None:
    """
    Raises:
        UserError: the same weights would be two networks; options of training alone, such as the gate's schedules, may
            differ.
    """
    ours, theirs = (dotted_settings(m.model_dump(mode="json"), "model.") for m in (model, other))
    different = [name for name in ours | theirs if ours.get(name) != theirs.get(name) and not is_free(name)]
    different = [name for name in different if name != "model.pattern" or model.letters != other.letters]
    if different:
        listed = ", ".join(f"{name}={ours.get(name)!r} and {theirs.get(name)!r}" for name in different[:4])
        raise UserError(f"{first} and {second} are different networks ({listed}); a mean takes one network")


if __name__ == "__main__":
    sys.exit(main())
