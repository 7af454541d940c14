"""`python -m experiments.attention_value RUN`: what window attention is worth to each token of a trained model.

RUN is a model with layers `W`, kept by `real_text.py --recipes samba --keep`. Its attention output is multiplied by a
mask, token by token and layer by layer; nothing is trained. The value of a (token, layer) pair is -d loss / d mask,
averaged over masks that keep each pair with probability 1/2: the mean of the loss from removing it and the gain from
adding it. Printed as JSON: cross entropy on held-out text with all, no or one layer's pairs, and by the share of pairs
that keep their attention, chosen

    by value        by the values of these very tokens, which depend on their labels: a bound that no gate can reach
    by gate         by a linear function of what a gate reads, fitted by least squares to values on the training text
    at random

each followed by the share kept in every layer.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_taipan.data.batch import Batch
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.perplexity import INPUTS, read_batches
from megatron_taipan.inference.loading import load_model, parse_device
from megatron_taipan.model.blocks import AttentionBlock
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.programs import exits_cleanly

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)
DRAWS = 3  # masks that a value is averaged over
RIDGE = 1e-3  # of the mean square of what a gate reads


class Masked:
    """A model whose attention layers multiply their outputs by masks, and remember their inputs."""

    def __init__(self, model: Taipan):
        self.model, self.device = model, next(model.parameters()).device
        self.masks: list[Tensor] = []  # [layers] of [b, l]
        self.read: list[Tensor] = []  # [layers] of [b, l, d]
        blocks = [block for block in model.modules() if isinstance(block, AttentionBlock)]
        self.layers = len(blocks)
        for index, block in enumerate(blocks):
            block._attend = self._masked(block._attend, index)  # type: ignore[method-assign]

    def _masked(self, attend: Callable, index: int) -> Callable:
        def run(u: Tensor, ctx, state) -> Tensor:
            self.read.append(u.detach())
            return attend(u, ctx, state) * self.masks[index][..., None].to(u.dtype)

        return run

    def loss(self, rows: Batch, masks: list[Tensor]) -> Tensor:
        """Summed cross entropy of rows with a mask [b, l] for each layer."""
        self.masks, self.read = masks, []
        tokens, labels, scored, seq_idx = (rows[name].to(self.device) for name in INPUTS)
        return self.model(tokens, labels=labels, loss_mask=scored, seq_idx=seq_idx, ce_scale=1.0).ce_loss

    def values(self, rows: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """([layers, b * l] values, [layers, b * l, d] the inputs of gates there, where every token attends)."""
        shape = rows["tokens"].shape
        total = torch.zeros(self.layers, rows["tokens"].numel(), device=self.device)
        for _ in range(DRAWS):
            drawn = torch.rand(self.layers, *shape, generator=generator) < 0.5
            masks = [mask.to(self.device, torch.float32).requires_grad_() for mask in drawn]
            total -= torch.stack([g.flatten() for g in torch.autograd.grad(self.loss(rows, masks), masks)])
        with torch.no_grad():
            self.loss(rows, list(torch.ones(self.layers, *shape, device=self.device)))
        return total / DRAWS, torch.stack([u.flatten(0, -2) for u in self.read])


def with_ones(u: Tensor) -> Tensor:
    """[..., d] -> [..., d + 1] in float64: a linear function of it has a bias."""
    return torch.cat([u.double(), u.new_ones(*u.shape[:-1], 1, dtype=torch.float64)], -1)


def fit(masked: Masked, batches: list[Batch], generator: torch.Generator) -> Tensor:
    """[layers, d + 1] the linear functions of the gates' inputs that are nearest to the values."""
    squares = products = torch.zeros((), dtype=torch.float64, device=masked.device)
    for rows in batches:
        worth, u = masked.values(rows, generator)
        u = with_ones(u)
        squares = squares + u.mT @ u  # [layers, d + 1, d + 1]
        products = products + (u.mT @ worth.double()[..., None])  # [layers, d + 1, 1]
    ridge = RIDGE * squares.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return torch.linalg.solve(squares + ridge * torch.eye(squares.shape[-1]).to(squares), products)[..., 0]


def keep_largest(ranking: list[Tensor], share: float) -> list[Tensor]:
    """The pairs [layers, n] of that share, over all batches and layers, that rank highest."""
    every = torch.cat([r.flatten() for r in ranking])
    kept = round(len(every) * share)
    edge = every.sort(descending=True).values[kept - 1] if kept else torch.inf
    return [r >= edge for r in ranking]


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--tokens", type=int, default=1 << 18, help="tokens scored; twice as many are fitted")
    options = parser.parse_args(arguments)
    device = parse_device("auto")
    model, _, config = load_model(options.run, torch.bfloat16 if device.type == "cuda" else torch.float32)
    masked = Masked(model.to(device))
    if config is None or not masked.layers:
        raise UserError(
            f"{options.run} is not a run of launch/pretrain.py with layers W; real_text.py --keep keeps such runs"
        )
    data, vocab = config.data.model_copy(update={"seed": 0}), config.model.vocab_size
    rows, generator = max(1, options.tokens // data.seq_len), torch.Generator().manual_seed(0)
    batch = min(8, rows)
    training = list(read_batches(build_dataset(data, "train", vocab), 2 * rows, batch))
    held_out = list(read_batches(build_dataset(data, "valid", vocab), rows, batch))
    print(json.dumps(measure_value(masked, training, held_out, generator), indent=1))
    return 0


def measure_value(masked: Masked, training: list[Batch], held_out: list[Batch], generator: torch.Generator) -> dict:
    """What the program prints."""
    gates = fit(masked, training, generator)
    known = [masked.values(batch, generator) for batch in held_out]
    worth = [values for values, _ in known]
    rankings = {
        "by value": worth,
        "by gate": [(with_ones(u) @ gates[..., None])[..., 0] for _, u in known],
        "at random": [torch.rand(w.shape, generator=generator).to(w.device) for w in worth],
    }
    tokens = sum(float(batch["loss_mask"].sum()) for batch in held_out)

    @torch.no_grad()
    def score(kept: list[Tensor]) -> list[float]:
        """Cross entropy, and the share kept in each layer."""
        total = 0.0
        for batch, keep in zip(held_out, kept, strict=True):
            total += float(masked.loss(batch, [k.float().view(batch["tokens"].shape) for k in keep]))
        return [round(total / tokens, 4), *(round(s, 3) for s in torch.cat(kept, 1).float().mean(1).tolist())]

    found: dict = {"tokens": tokens, "all": score([w > -torch.inf for w in worth])}
    found["none"] = score([w > torch.inf for w in worth])
    for layer in range(masked.layers):
        only = torch.arange(masked.layers, device=masked.device)[:, None] == layer  # [layers, 1]
        found[f"layer {layer} alone"] = score([only.expand_as(w) for w in worth])
    for name, ranking in rankings.items():
        found[name] = {share: score(keep_largest(ranking, share)) for share in SHARES}
    return found


if __name__ == "__main__":
    sys.exit(main())
