"""The sums that programs leave of their rows, added up over programs: the gradients of a layer's vectors.

torch's sum asks for a memset and a cast beside the kernel that adds, and takes as long for these small tensors as for
ones ten times as large; a layer has four of them.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 64, 32  # of a tile: 132 rows of 4,096 columns, the gated norm's of the 1.3B presets, fill the GPU


@triton.jit
def _column_sums_kernel(parts_ptr, out_ptr, rows, columns, stride_part, stride_row, turn,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    part = tl.program_id(1)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    base = parts_ptr + part.to(tl.int64) * stride_part + at[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        total += tl.load(base + row.to(tl.int64)[:, None] * stride_row, mask=(row < rows)[:, None] & (at < columns)[None, :],
                         other=0.0)  # fmt: skip
    to = part.to(tl.int64) * columns + at % turn * (columns // turn) + at // turn
    tl.store(out_ptr + to, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=at < columns)


def column_sums(parts: torch.Tensor, dtype: torch.dtype, turned: bool = False) -> torch.Tensor:
    """parts.sum(-2) in that type, of float32 [..., rows, columns] or [..., rows, k, columns] with turned.

    Args:
        turned: the sums [..., k, columns] are written as [..., columns, k].
    """
    if turned:
        *parts_shape, rows, k, columns = parts.shape
        assert parts.stride(-2) == columns  # so that both are one range of k x columns
        shape, width, turn = (*parts_shape, columns, k), k * columns, columns
        stride_row = parts.stride(-3)
    else:
        *parts_shape, rows, columns = parts.shape
        shape, width, turn = (*parts_shape, columns), columns, columns
        stride_row = parts.stride(-2)
    assert parts.stride(-1) == 1 and len(parts_shape) <= 1
    out = torch.empty(shape, dtype=dtype, device=parts.device)
    count = parts_shape[0] if parts_shape else 1
    _column_sums_kernel[(triton.cdiv(width, COLUMNS), count)](
        parts, out, rows, width, parts.stride(0) if parts_shape else 0, stride_row, turn, ROWS=ROWS, COLUMNS=COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return out
