"""The decoding cache: constant memory for Mamba-2 and window attention, all keys for full attention."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class LayerState(Protocol):
    """What one layer keeps of the tokens that it has seen."""

    def forget(self, rows: Tensor) -> None:
        """The rows (bool [b]) of which the next token starts another document no longer see the old one."""

    def select(self, index: Tensor) -> None:
        """Keeps, repeats or reorders rows: index [new b] of row numbers."""

    def reserve(self) -> None:
        """What the host does before one more token a row is added."""

    def to(self, device: torch.device | int | str) -> "LayerState":
        """Moves itself to the layer's device; no copy where it is there."""

    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds, the batch first."""


@dataclass
class MambaState:
    """One Mamba-2 layer: the last d_conv - 1 inputs of the convolution and the SSM state."""

    conv_tail: Tensor  # [b, d_conv - 1, channels]
    ssm: Tensor  # [b, h, p, n] float32

    def forget(self, rows: Tensor) -> None:
        """Zeroes the rows (bool [b]) whose next token starts another document."""
        rows = rows.to(self.ssm.device)
        self.conv_tail = torch.where(rows[:, None, None], 0, self.conv_tail)
        self.ssm = torch.where(rows[:, None, None, None], 0, self.ssm)

    def select(self, index: Tensor) -> None:
        index = index.to(self.ssm.device)
        self.conv_tail, self.ssm = self.conv_tail[index], self.ssm[index]

    def reserve(self) -> None:
        """Nothing to do: its size does not change."""

    def to(self, device: torch.device | int | str) -> "MambaState":
        self.conv_tail, self.ssm = self.conv_tail.to(device), self.ssm.to(device)
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        return self.conv_tail, self.ssm


class KeyValueStore:
    """Keys and values of one attention layer, in the order of their positions.

    With a window the buffer holds 2 x window tokens: new ones are written after the old, and when it is full the
    last window - 1 move to the front. So memory is constant, the move costs one copied token per decoded token, and
    what a query sees is always one contiguous interval. Without a window the buffer grows by doubling.
    """

    def __init__(self, batch: int, heads: int, head_dim: int, window: int | None, device, dtype):
        self.window = window
        capacity = 2 * window if window else 256
        self.keys = torch.zeros(batch, capacity, heads, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.used = 0  # tokens in the buffer
        self.first = 0  # position of the buffer's first token
        self.origin: Tensor | None = None  # [] int64, `first` on the device, for `buffers`
        self.filled: int | None = None  # what `origin` holds

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Adds new tokens.

        Args:
            k, v: [b, l, heads, head_dim].

        Returns:
            keys and values [b, s, heads, head_dim] that hold every token the new ones may see, and the position of
            the first of the s.
        """
        new = k.shape[1]
        if self.used + new > self.keys.shape[1]:
            self._make_room(new)
        if self.used + new > self.keys.shape[1]:  # a chunk longer than the buffer: attend over a concatenated copy
            keys = torch.cat([self.keys[:, : self.used], k], 1)
            values = torch.cat([self.values[:, : self.used], v], 1)
            first = self.first
            assert self.window is not None  # else the buffer has grown
            keep = self.window - 1
            self.first += self.used + new - keep
            self.used = keep
            self.keys[:, :keep], self.values[:, :keep] = (
                keys[:, -keep:] if keep else 0,
                values[:, -keep:] if keep else 0,
            )
            return keys, values, first
        self.keys[:, self.used : self.used + new] = k
        self.values[:, self.used : self.used + new] = v
        self.used += new
        return self.keys, self.values, self.first

    def reserve(self) -> None:
        """Makes room for one more token and counts it: what the host does before a step."""
        if self.origin is None:
            self.origin = torch.empty((), dtype=torch.int64, device=self.keys.device)
        if self.used + 1 > self.keys.shape[1]:
            self._make_room(1)
        if self.filled != self.first:
            self.origin.fill_(self.first)
            self.filled = self.first
        self.used += 1

    def buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [b, s, heads, head_dim], all slots, and the position [] of the first on the device: a
        captured step needs no number that the host holds."""
        assert self.origin is not None  # by `reserve`
        return self.keys, self.values, self.origin

    def grow(self, capacity: int) -> None:
        """Makes a buffer without a window hold that many tokens, so that it need not be doubled on the way there."""
        if self.window is not None or capacity <= self.keys.shape[1]:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            buffer = old.new_zeros(old.shape[0], capacity, *old.shape[2:])
            buffer[:, : self.used] = old[:, : self.used]
            setattr(self, name, buffer)

    def _make_room(self, new: int) -> None:
        if self.window is None:
            self.grow(max(2 * self.keys.shape[1], self.used + new))
            return
        keep = min(self.used, self.window - 1)
        for buffer in (self.keys, self.values):
            buffer[:, :keep] = buffer[:, self.used - keep : self.used].clone()
        self.first += self.used - keep
        self.used = keep

    def select(self, index: Tensor) -> None:
        index = index.to(self.keys.device)
        self.keys, self.values = self.keys[index], self.values[index]

    def forget(self, rows: Tensor) -> None:
        """Nothing to do: a query sees the keys of its document's interval (Context.interval)."""

    def to(self, device: torch.device | int | str) -> "KeyValueStore":
        self.keys, self.values = self.keys.to(device), self.values.to(device)
        self.origin = None if self.origin is None else self.origin.to(device)
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values


@dataclass
class Cache:
    """The state of all layers, and each row's place in its document.

    A row's tokens continue the cached document where their seq_idx equals the last one seen; where it differs, a
    new document starts and nothing of the old one is visible from there on.
    """

    layers: list[LayerState]
    length: int = 0  # tokens consumed so far, the same for every row
    last_seq_idx: Tensor | None = None  # [b]
    document_start: Tensor | None = None  # [b] position at which the current document began
    position: Tensor | None = None  # [1] int64, the position of the token that `advance` made room for

    def forget(self, rows: Tensor) -> None:
        """Makes the rows (bool [b]) whose next token starts another document forget the old one."""
        for layer in self.layers:
            layer.forget(rows)

    def select(self, index: Tensor) -> None:
        """Keeps, repeats or reorders rows: index [new b] of row numbers (beam search)."""
        for layer in self.layers:
            layer.select(index)
        if self.last_seq_idx is not None and self.document_start is not None:
            index = index.to(self.last_seq_idx.device)
            self.last_seq_idx, self.document_start = self.last_seq_idx[index], self.document_start[index]

    def advance(self) -> None:
        """What the host does before a step of one token a row (`Taipan.step`): counters, and room in the buffers."""
        some = self.layers[0].tensors()[0]
        if self.position is None:
            self.position = torch.empty(1, dtype=torch.int64, device=some.device)
        if self.document_start is None:  # nothing was prefilled
            self.document_start = torch.zeros(len(some), dtype=torch.int64, device=some.device)
            self.last_seq_idx = torch.zeros(len(some), dtype=torch.int32, device=some.device)
        self.position.fill_(self.length)
        self.length += 1
        for layer in self.layers:
            layer.reserve()

    def tensors(self) -> list[Tensor | None]:
        """What a step reads and writes in place: as long as these are the same tensors, a captured step is valid."""
        return [self.position, self.document_start, *(t for layer in self.layers for t in layer.tensors())]

    def n_bytes(self) -> int:
        """Memory held by the layers."""
        total = 0
        for layer in self.layers:
            total += sum(t.numel() * t.element_size() for t in layer.tensors())
        return total


def new_cache(layers: Iterable[Any], batch: int, devices: Sequence[Any], dtype: torch.dtype) -> Cache:
    """An empty cache for `batch` rows, each layer's part on its device."""
    return Cache([layer.new_state(batch, device, dtype) for layer, device in zip(layers, devices, strict=True)])
