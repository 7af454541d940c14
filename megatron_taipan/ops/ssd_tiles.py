"""How the kernels of the SSD scan read and write their tiles: tokens of one head or group, and states of one head.

Where a tensor's layout allows it, tiles move by the copy engine (tensor descriptors). It takes them past the registers
into shared memory while a program still works on the tile before, and leaves the registers that addresses and masks
would need to the products (docs/lab-notes.md has both ways' times). Otherwise a program loads them itself.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

CHUNK = 64  # tokens handled at once: one 64 x 64 tile of scores a warpgroup; measured in docs/lab-notes.md


@triton.jit
def load_tokens(source, row, first, column, stride_b, stride_l, length,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLACE: tl.constexpr, TILED: tl.constexpr):  # fmt: skip
    """[ROWS, COLUMNS] of a row [length, ...], from token `first` and channel `column` on; zeros past its end."""
    if TILED:
        return source.load([row * length + first, column])
    else:  # or the compiler would look at what follows as well
        tokens, columns = first + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        at = row.to(tl.int64) * stride_b + tokens.to(PLACE)[:, None] * stride_l + columns[None, :]
        return tl.load(source + at, mask=(tokens < length)[:, None], other=0.0)


@triton.jit
def store_tokens(target, value, row, first, column, stride_b, stride_l, length,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLACE: tl.constexpr, TILED: tl.constexpr):  # fmt: skip
    """Writes what `load_tokens` reads; nothing past the row's end."""
    if TILED:
        target.store([row * length + first, column], value.to(target.dtype))
    else:
        tokens, columns = first + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        at = row.to(tl.int64) * stride_b + tokens.to(PLACE)[:, None] * stride_l + columns[None, :]
        tl.store(target + at, value.to(target.dtype.element_ty), mask=(tokens < length)[:, None])


@triton.jit
def load_state(source, slot, P: tl.constexpr, N: tl.constexpr, TILED: tl.constexpr):
    """[P, N], the slot-th of contiguous states."""
    if TILED:
        return source.load([slot * P, 0])
    else:
        tile = tl.arange(0, P)[:, None] * N + tl.arange(0, N)[None, :]
        return tl.load(source + slot.to(tl.int64) * P * N + tile)


@triton.jit
def store_state(target, value, slot, P: tl.constexpr, N: tl.constexpr, TILED: tl.constexpr):
    """Writes what `load_state` reads."""
    if TILED:
        target.store([slot * P, 0], value.to(target.dtype))
    else:
        tile = tl.arange(0, P)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(target + slot.to(tl.int64) * P * N + tile, value.to(target.dtype.element_ty))


def tiled(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can move the tiles of all these tensors [b, l, h or g, p or n], and is worth it.

    Rows of whole chunks, since a tile past a row's end would have the next row's tokens; tokens at multiples of 16
    bytes, rows one after the other; 16 bits, since tiles in float32 leave no room for the next ones.
    """
    return _has_engine(tensors[0]) and all(_tiled(tensor) for tensor in tensors)


def _tiled(x: torch.Tensor) -> bool:
    b, l, h, p = x.shape
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
    in_order = x.stride()[1:] == (x.stride(1), p, 1) and (b == 1 or x.stride(0) == l * x.stride(1))
    apart = x.stride(1) >= h * p  # CUDA's documentation of tensor maps has no rows that share memory
    counted = b * l < 2**31 and b * l // CHUNK * h * p < 2**31  # coordinates of tokens and states have 32 bits
    return l % CHUNK == 0 and aligned and in_order and apart and counted


def _has_engine(x: torch.Tensor) -> bool:
    if x.device.type != "cuda":  # the interpreter: it has an engine of its own, and no room to save
        return True
    return x.element_size() == 2 and torch.cuda.get_device_capability(x.device) >= (9, 0)


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; of the interpreter, as many as it likes."""
    if device.type != "cuda":
        return 1 << 40
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 1 << 40))  # torch has it from 2.7 on


def of_tokens(x: torch.Tensor, by_engine: bool) -> "TensorDescriptor | torch.Tensor":
    """x [b, l, h, p] as `load_tokens` takes it: tiles [CHUNK, p]."""
    if not by_engine:
        return x
    b, l, h, p = x.shape
    return TensorDescriptor(x, [b * l, h * p], [x.stride(1), 1], [CHUNK, p])


def of_states(x: torch.Tensor, by_engine: bool) -> "TensorDescriptor | torch.Tensor":
    """x [..., p, n], contiguous, as `load_state` takes it."""
    if not by_engine or not x.numel():
        return x
    p, n = x.shape[-2:]
    return TensorDescriptor(x, [x.numel() // n, n], [n, 1], [p, n])


def place_type(length: int, *tensors: torch.Tensor):
    """Of a token as the factor of a stride: int64 where offsets within a row [b, length, ...] of one of the tensors
    pass 2^31, as those of the 1.3B models' projections of 8,512 columns do from 252,289 tokens on."""
    return tl.int64 if any(length * tensor.stride(1) >= 2**31 for tensor in tensors) else tl.int32
