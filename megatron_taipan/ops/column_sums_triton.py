"""The sums that programs leave of their rows, added up over programs: the gradients of a layer's vectors.

torch's sum asks for a memset and a cast beside the kernel that adds, and takes as long for these small tensors as for
ones ten times as large; a layer has four of them.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 64, 32  # of a tile: 132 rows of 4,096 columns, the gated norm's of the 1.3B presets, fill the GPU


@triton.jit
def _column_sums_kernel(parts_ptr, out_ptr, turned_ptr, rows, columns, stride_part, stride_row, channels, width,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    base = parts_ptr + part * stride_part + at[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (at < columns)[None, :]
        total += tl.load(base + row.to(tl.int64)[:, None] * stride_row, mask=inside, other=0.0)
    sums = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    turned = width * channels  # so many columns
    tl.store(turned_ptr + at % channels * width + at // channels, sums, mask=at < turned)
    tl.store(out_ptr + part * columns + at - turned, sums, mask=(at >= turned) & (at < columns))


def column_sums(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """parts.sum(0) [columns] in that type, of float32 [rows, columns]; of [several, rows, columns] each one's."""
    *several, _, columns = parts.shape
    out = torch.empty((*several, columns), dtype=dtype, device=parts.device)
    _launch(parts, out, out, columns, 0)
    return out


def weight_and_bias_sums(parts: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution's gradients of weight [channels, width] and bias [channels] in that type.

    Args:
        parts: [rows, width + 1, channels] float32, contiguous, the bias's last.
    """
    width, channels = parts.shape[1] - 1, parts.shape[2]
    weight = torch.empty((channels, width), dtype=dtype, device=parts.device)
    bias = torch.empty((channels,), dtype=dtype, device=parts.device)
    _launch(parts.flatten(1), bias, weight, channels, width)
    return weight, bias


def _launch(parts: torch.Tensor, out: torch.Tensor, turned: torch.Tensor, channels: int, width: int) -> None:
    assert parts.stride(-1) == 1 and parts.ndim <= 3
    rows, columns = parts.shape[-2:]
    _column_sums_kernel[(triton.cdiv(columns, COLUMNS), parts.shape[0] if parts.ndim == 3 else 1)](
        parts, out, turned, rows, columns, parts.stride(0), parts.stride(-2), channels, width, ROWS=ROWS,
        COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
