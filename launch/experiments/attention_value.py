"""`python -m launch.experiments.attention_value RUN`: what window attention is worth to each token of a trained model.

RUN is a model with layers `W` from real_text.py --keep. Its attention output o is multiplied by a mask m, token by
token and layer by layer, and nothing is trained. A token's value is -d loss / d m, averaged over masks that keep each
token with probability 1/2: the mean of what it loses when it goes and gains when it comes. Printed as JSON, cross
entropy on held-out text by the share of (token, layer) pairs that keep their attention, chosen

    by value        by the values of these very tokens, which know the answer: a bound, and no gate can have it
    by gate         by a linear function of what a gate reads, fitted to the values of tokens of the training text
    at random
    one layer       every token of one layer and none of the others
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from megatron_taipan.data.loader import build_dataset
from megatron_taipan.errors import UserError, exits_cleanly
from megatron_taipan.evaluation.perplexity import read_batches
from megatron_taipan.inference.loading import load_model, pick_device
from megatron_taipan.model.blocks import AttentionBlock
from megatron_taipan.model.taipan import Taipan

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)
DRAWS = 3  # masks that values are averaged over


class Masked:
    """A model whose attention layers multiply their output by a mask, and remember what they read."""

    def __init__(self, model: Taipan):
        self.model = model
        self.blocks = [block for block in model.modules() if isinstance(block, AttentionBlock)]
        self.masks: list[Tensor] = []  # [layers] of [b, l]
        self.read: list[Tensor] = []  # [layers] of [b, l, d]
        for index, block in enumerate(self.blocks):
            block._attend = self._masked(block._attend, index)

    def _masked(self, attend, index):
        def run(u, ctx, state):
            self.read.append(u.detach())
            o = attend(u, ctx, state)
            return o * self.masks[index].view(*o.shape[:-1], 1).to(o.dtype)

        return run

    def loss(self, rows, masks: list[Tensor]) -> Tensor:
        """Summed cross entropy of some rows."""
        self.masks, self.read = masks, []
        device = next(self.model.parameters()).device
        tokens, labels, mask, seq_idx = (rows[n].to(device) for n in ("tokens", "labels", "loss_mask", "seq_idx"))
        return self.model(tokens, labels=labels, loss_mask=mask, seq_idx=seq_idx, ce_scale=1.0).ce_loss


def values(masked: Masked, rows, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """([layers, n] value of each token, [layers, n, d] what a gate there reads with every token attending)."""
    device, shape = next(masked.model.parameters()).device, rows["tokens"].shape
    total = torch.zeros(len(masked.blocks), rows["tokens"].numel(), device=device)
    for _ in range(DRAWS):
        masks = [(torch.rand(shape, generator=generator) < 0.5).to(device).float() for _ in masked.blocks]
        for m in masks:
            m.requires_grad_(True)
        grads = torch.autograd.grad(masked.loss(rows, masks), masks)
        total -= torch.stack([g.flatten() for g in grads])
    with torch.no_grad():
        masked.loss(rows, [torch.ones(shape, device=device) for _ in masked.blocks])
    return total / DRAWS, torch.stack([u.flatten(0, -2) for u in masked.read])


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--tokens", type=int, default=1 << 18, help="tokens scored, and twice as many fitted")
    options = parser.parse_args(arguments)
    device = pick_device("auto")
    model, _, config = load_model(options.run, torch.bfloat16 if device.type == "cuda" else torch.float32)
    masked = Masked(model.to(device))
    if config is None or not masked.blocks:
        raise UserError(f"{options.run} is no run of real_text.py with layers W")
    data, vocab = config.data.model_copy(update={"seed": 0}), config.model.vocab_size
    batch = min(8, max(1, options.tokens // data.seq_len))
    rows = max(1, options.tokens // data.seq_len)
    generator = torch.Generator().manual_seed(0)

    layers, d = len(masked.blocks), config.model.d_model
    squares = torch.zeros(layers, d + 1, d + 1, dtype=torch.float64, device=device)
    products = torch.zeros(layers, d + 1, dtype=torch.float64, device=device)
    for some in read_batches(build_dataset(data, "train", vocab), 2 * rows, batch):
        worth, u = values(masked, some, generator)
        u = torch.cat([u.double(), torch.ones_like(u[..., :1]).double()], -1)
        squares += u.mT @ u
        products += (u.mT @ worth.double()[..., None])[..., 0]
    eye = torch.eye(d + 1, dtype=torch.float64, device=device)
    gates = torch.linalg.solve(
        squares + 1e-3 * squares.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye, products
    )

    held_out = list(read_batches(build_dataset(data, "valid", vocab), rows, batch))
    known = [values(masked, some, generator) for some in held_out]
    rankings = {
        "by value": [worth for worth, _ in known],
        "by gate": [torch.einsum("knd,kd->kn", u.double(), gates[:, :-1]) + gates[:, -1:] for _, u in known],
        "at random": [torch.rand(worth.shape, generator=generator).to(device) for worth, _ in known],
    }
    count = sum(float(some["loss_mask"].sum()) for some in held_out)

    @torch.no_grad()
    def score(chosen: list[Tensor]) -> float:
        """Cross entropy where [layers, n] pairs are chosen."""
        total = 0.0
        for some, keep in zip(held_out, chosen, strict=True):
            total += float(masked.loss(some, [k.float().view(some["tokens"].shape) for k in keep]))
        return round(total / count, 4)

    found: dict = {
        "all": score([torch.ones_like(w) for w, _ in known]),
        "none": score([torch.zeros_like(w) for w, _ in known]),
    }
    found["mean value"] = (sum(w.sum(1) for w, _ in known) / count).tolist()
    found["r2 of the gate"] = [
        1
        - float(
            ((torch.cat(rankings["by gate"], 1) - torch.cat(rankings["by value"], 1))[k]).square().mean()
            / torch.cat(rankings["by value"], 1)[k].var()
        )
        for k in range(layers)
    ]
    for layer in range(layers):
        only = [torch.zeros_like(w) for w, _ in known]
        for o in only:
            o[layer] = 1
        found[f"only layer {layer}"] = score(only)
    for name, ranking in rankings.items():
        together = torch.cat([r.flatten() for r in ranking]).float()
        for share in SHARES:
            edge = together.kthvalue(max(1, int(len(together) * (1 - share)))).values
            chosen = [r > edge for r in ranking]
            by_layer = [round(float(torch.cat([c[k] for c in chosen]).float().mean()), 3) for k in range(layers)]
            found[f"{name}, {share}"] = [score(chosen), *by_layer]
            last = [
                torch.stack([*torch.ones_like(r[:-1]), r[-1] > r_edge])
                for r, r_edge in (
                    (
                        r,
                        torch.cat([x[-1] for x in ranking])
                        .float()
                        .kthvalue(max(1, int(sum(x.shape[1] for x in ranking) * (1 - share))))
                        .values,
                    )
                    for r in ranking
                )
            ]
            found[f"{name}, {share} of the last layer, all of the others"] = score(last)
    print(json.dumps({"run": str(options.run), "tokens": count, "found": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
