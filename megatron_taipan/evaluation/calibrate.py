"""`python -m megatron_taipan.evaluation.calibrate CHECKPOINT`: thresholds that select the fraction C of held-out text.

In training P(m = 1) = alpha, so the budget pins the mean of alpha to C. In evaluation a token is selected where
s_1 - s_0 exceeds a threshold, and with threshold 0 (alpha > 1/2) the fraction differs from C unless the gates saturate.
The threshold of each layer is set to the (1 - C) quantile of s_1 - s_0. The result is stored beside the checkpoint;
evaluation, generation and export use it from then on.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_taipan.checkpoint.calibration import write_thresholds
from megatron_taipan.checkpoint.folder import locate
from megatron_taipan.checkpoint.weights import is_export
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.chunked import AT_ONCE
from megatron_taipan.evaluation.perplexity import choose_data
from megatron_taipan.inference.generation import prefill
from megatron_taipan.inference.loading import load_model, parse_device
from megatron_taipan.inference.selection_watch import gated_blocks
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly

MAX_MARGINS = 10_000_000  # values kept for a quantile; 40 MB


@torch.no_grad()
def calibrate(model: Taipan, batches: Sequence[Mapping[str, Any]], capacity: float | None = None) -> list[float]:
    """Sets `gate.threshold` of every S layer and returns the thresholds, in the order of the layers.

    Layer by layer from below, because what a layer selects changes what the layers above it see: one pass over the
    batches for each S layer.

    Args:
        batches: held-out micro-batches as the loader gives them, on the model's device: tokens [b, l], and seq_idx
            [b, l] or None.
        capacity: wanted fraction; None: the configuration's C.

    Raises:
        UserError: no batches, the model has no S layer or draws at random, or the capacity is not a fraction.
    """
    wanted = model.config.gate.final_capacity if capacity is None else capacity
    gates = [block.gate for block in gated_blocks(model)]
    if not gates or not batches:
        what = (
            "no batches to calibrate on" if gates else f"pattern {model.config.pattern!r} has no S layer to calibrate"
        )
        raise UserError(f"calibrate: {what}")
    if model.config.gate.noise == "random":
        raise UserError(
            "calibrate: model.gate.noise=random draws the fraction C of the tokens by itself, and no threshold changes"
            f" which; C is {model.config.gate.final_capacity:g}"
        )
    if not 0 <= wanted <= 1:
        raise UserError(f"calibrate: capacity={wanted} is not a fraction between 0 and 1")
    was_training = model.training
    model.eval()
    for gate in gates:
        margins: list[Tensor] = []
        hook = gate.register_forward_hook(
            lambda _, __, selection, into=margins: into.append(selection.margin.flatten())
        )
        for batch in batches:
            _read(model, batch["tokens"], batch["seq_idx"])
        hook.remove()
        gate.threshold.copy_(_quantile(torch.cat(margins).float(), wanted))
    model.train(was_training)
    return [gate.threshold.item() for gate in gates]


def _read(model: Taipan, tokens: Tensor, documents: Tensor | None) -> None:
    """Lets the gates see rows [b, l] and their documents [b, l] (None: one a row)."""
    if tokens.shape[1] <= AT_ONCE:
        model(tokens, seq_idx=documents, all_logits=False)
        return
    documents = torch.zeros_like(tokens, dtype=torch.int32) if documents is None else documents
    prefill(model, tokens, documents, model.new_cache(len(tokens)), AT_ONCE)


def _quantile(margins: Tensor, fraction: float) -> Tensor:
    """A value that `fraction` of the margins exceed, halfway between the neighbours."""
    if margins.numel() > MAX_MARGINS:
        margins = margins[:: -(-margins.numel() // MAX_MARGINS)]
    ordered = margins.sort(descending=True).values
    above = round(fraction * len(ordered))
    if above == 0:
        return ordered[0] + 1
    if above == len(ordered):
        return ordered[-1] - 1
    return (ordered[above - 1] + ordered[above]) / 2


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m megatron_taipan.evaluation.calibrate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder for its newest")
    parser.add_argument("--data", help="prefix of a .bin/.idx pair; default: the validation part of the run's data")
    parser.add_argument("--samples", type=int, default=32, help="samples to calibrate on")
    parser.add_argument("--capacity", type=float, help="wanted fraction; default: the model's C")
    parser.add_argument("--batch", type=int, default=4, help="samples per forward pass")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    if options.samples < 1 or options.batch < 1:
        raise UserError(f"--samples={options.samples} and --batch={options.batch} must be at least 1")

    if is_export(options.checkpoint):
        raise UserError(
            f"{options.checkpoint} is an exported folder, and thresholds are stored beside a checkpoint; calibrate the"
            " checkpoint that it was exported from, and export it again"
        )
    path, device = locate(str(options.checkpoint)), parse_device(options.device)
    model, _, config = load_model(path)
    model.to(device)
    data = choose_data(config, options.data, None, path)
    dataset = build_dataset(data, "train" if options.data else "valid", model.config.vocab_size)
    count = min(options.samples, len(dataset))
    rows = [list(range(first, min(first + options.batch, count))) for first in range(0, count, options.batch)]
    read = map(dataset.batch, rows)
    batches = [{name: batch[name].to(device) for name in ("tokens", "seq_idx")} for batch in read]
    thresholds = calibrate(model, batches, options.capacity)
    capacity = model.config.gate.final_capacity if options.capacity is None else options.capacity
    names = [name for name, _ in model.named_buffers() if name.endswith("gate.threshold")]
    stored = write_thresholds(
        path, dict(zip(names, thresholds, strict=True)), capacity=capacity, tokens=count * data.seq_len
    )
    for name, threshold in zip(names, thresholds, strict=True):
        print(f"{name:<32} {threshold:+.4f}")
    print(f"{capacity:.0%} of {count * data.seq_len:,} held-out tokens are selected in each layer; stored in {stored}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
