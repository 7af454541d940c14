"""Muon's arithmetic: the orthogonal matrix near each update, and how long a step with it is."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5; Keller Jordan's, chosen for their slope at 0
SMALLEST = 1e-7  # norm that a matrix is divided by
TOGETHER = 2**27  # elements of matrices that are iterated at once


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """U f(S / |S|) V^T of each matrix U S V^T, |S| its Frobenius norm, and f the polynomial of COEFFICIENTS applied
    `steps` times: 5 bring all that is above about 0.01 to between 0.68 and 1.21.

    The arithmetic of torch.optim.Muon and of kellerjordan.github.io/posts/muon, for many matrices of one shape at once.

    Args:
        matrices: [n, rows, columns], in the type to compute in.
    """
    first, third, fifth = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x.mT if tall else x


def orthogonalise(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """`newton_schulz` of matrices of any shapes, those of one shape together in few launches."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    made = list(matrices)
    for shape, which in by_shape.items():
        at_once = max(1, TOGETHER // shape.numel())
        for first in range(0, len(which), at_once):
            some = which[first : first + at_once]
            for i, result in zip(some, newton_schulz(torch.stack([matrices[i] for i in some]), steps), strict=True):
                made[i] = result
    return made


def update_scale(shape: tuple[int, ...], rule: str) -> float:
    """The factor of the learning rate for a whole matrix [rows, columns]; rule: OptimConfig.muon_scale.

    `rms` is arXiv 2502.16982, section 2.2: an orthogonal matrix has elements of root mean square 1 / sqrt(larger side),
    AdamW's updates have 0.2 to 0.4. `shape` is Keller Jordan's.
    """
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if rule == "rms" else math.sqrt(max(1.0, rows / columns))


def work(shape: tuple[int, ...]) -> int:
    """Multiplications of one iteration."""
    small, large = sorted(shape)
    return small * small * (2 * large + small)
