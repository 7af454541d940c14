"""`python -m checkpoints.import_hf FOLDER OUT [--config FILE]`: weights of an exported model for a new run.

Without --config the network stays the same and the exported folder itself would do as `checkpoint.init`; with it the
weights go into another pattern (layers match by letter), and the report says what is new, what was left and which
options compute something else. What is written is read again: the folder's network gives the same logits with it.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from checkpoints.foreign.agreement import Answer, compare_logits, our_logits
from checkpoints.map_weights import Source, map_weights, other_options
from megatron_taipan.checkpoint.weights import ExportedWeights, open_export
from megatron_taipan.config_loading import load_config
from megatron_taipan.errors import UserError, writing
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.programs import exits_cleanly

# Options with which the same weights are another sensible network; all others say how the weights are to be read.
CHOICES = ("norm_eps", "attention.window", "attention.rope_theta", "gate.refinement", "gate.weight")


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.import_hf", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that checkpoints.export_hf or an import wrote")
    parser.add_argument("out", type=Path, help="folder to write; start the run with checkpoint.init=OUT")
    parser.add_argument("--config", type=Path, help="configuration of the new run; default: the folder's own network")
    parser.add_argument("overrides", nargs="*", help="section.option=value")
    options = parser.parse_intermixed_args(arguments)  # overrides may follow --config
    if options.overrides and not options.config:
        raise UserError(f"{' '.join(options.overrides)}: options override a configuration; pass --config FILE")
    weights = open_export(options.folder)
    config = load_config(options.config, options.overrides) if options.config else None
    target = config.model if config else weights.network
    source = exported_source(weights, target)
    with writing(options.out):
        report = map_weights(target, source, options.out, config.train.seed if config else 0)
    print(report.text())
    print(f"wrote {options.out}; start with checkpoint.init={options.out}")
    return 0


def exported_source(weights: ExportedWeights, target: ModelConfig) -> Source:
    """The tensors of an exported folder.

    Raises:
        UserError: it holds others than its network has, or the target would read them otherwise.
    """
    folder, network = weights.path, weights.network
    refuse_unknown_tensors(weights)
    shapes = {name: weights.shape(name) for name in weights.names()}
    other = other_options(network, target)
    wrong = [name for name in other if name not in CHOICES]
    if wrong:
        listed = ", ".join(f"{name}={other[name][0]} (the target has {other[name][1]})" for name in wrong)
        raise UserError(f"{folder} has {listed}; set the model's options to the source's")
    notes = [f"{name}: {theirs} in the source, {ours} in the target" for name, (theirs, ours) in other.items()]
    if target.tie_embeddings and not network.tie_embeddings:
        raise UserError(f"{folder} has a separate head; set model.tie_embeddings=false")
    separated = network.tie_embeddings and not target.tie_embeddings
    if separated:  # the new head starts as what the source has for one, the embedding
        shapes["head.weight"] = shapes["embedding.weight"]
        network = network.model_copy(update={"tie_embeddings": False})

    def load(name: str) -> torch.Tensor:
        return weights.load("embedding.weight" if separated and name == "head.weight" else name)

    def ask(tokens: torch.Tensor) -> Answer:
        return Answer(f"{folder}", our_logits(network, load, tokens, torch.float64))

    check = partial(compare_logits, network, min(target.vocab_size, network.vocab_size), ask)
    return Source(network.letters, shapes, load, check, notes)


def refuse_unknown_tensors(weights: ExportedWeights) -> None:
    """
    Raises:
        UserError: a tensor has no place in the folder's own network, or another shape than there.
    """
    with torch.device("meta"):
        known = {name: tuple(tensor.shape) for name, tensor in Taipan(weights.network).state_dict().items()}
    unknown = [name for name in weights.names() if name not in known]
    if unknown:
        raise UserError(
            f"{weights.path} holds {len(unknown)} tensors that its network does not have: {', '.join(unknown[:6])}"
        )
    for name in weights.names():
        if weights.shape(name) != known[name]:
            raise UserError(
                f"{weights.path}: {name} has shape {list(weights.shape(name))}, its network's is {list(known[name])}"
            )


if __name__ == "__main__":
    sys.exit(main())
