"""The gradient of a product's weight."""

import torch
from torch import Tensor


def weight_gradient(rows: Tensor, x: Tensor) -> Tensor:
    """rows^T x, the gradient of a product's weight: [n, e], [n, d] -> [e, d].

    In two products where a tall gradient ends in a part of a tile: that part costs a whole wave of tiles more. The
    8,512 rows of the 1.3B presets' in_proj take 6 % less time as 8,320 and 192 (docs/lab-notes.md).
    """
    e = rows.shape[1]
    if not rows.is_cuda or e < 8192 or e % 128 == 0:
        return rows.t() @ x
    gradient = torch.empty((e, x.shape[1]), dtype=x.dtype, device=x.device)
    cut = (e // 128 - 1) * 128
    torch.mm(rows[:, :cut].t(), x, out=gradient[:cut])
    torch.mm(rows[:, cut:].t(), x, out=gradient[cut:])
    return gradient
