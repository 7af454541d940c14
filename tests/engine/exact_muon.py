"""Muon without its iteration: the same polynomial applied to the singular values, in float64."""

import re

import torch
from torch import Tensor

# by hand, beside the parameter table
PROJECTION = re.compile(
    r"layers\.\d+\.(mixer\.(in_proj_\w+|out_proj)|attention\.\w_proj|attention\.out_proj|mlp\.\w+_proj)"
)


def is_projection(name: str) -> bool:
    """Whether Muon steps the parameter."""
    return PROJECTION.fullmatch(name) is not None


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """U f(S) V^T with f the polynomial of the Newton-Schulz iteration, `steps` times."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


class ExactMuon:
    """torch.optim.Muon's step, with the scale of arXiv 2502.16982, equation 4."""

    def __init__(self, params: list[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95):
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.averages = [(p, torch.zeros_like(p, dtype=torch.float64)) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for p, average in self.averages:
            grad = p.grad.double()
            average.mul_(self.momentum).add_(grad, alpha=1 - self.momentum)
            update = orthogonal(self.momentum * average + (1 - self.momentum) * grad)
            scale = 0.2 * max(p.shape) ** 0.5
            p.copy_(p.double() * (1 - self.lr * self.weight_decay) - self.lr * scale * update)
