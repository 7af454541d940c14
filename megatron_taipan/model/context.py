"""What a forward pass knows about its tokens: positions, documents, samples, and the cache they extend."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_taipan.model.cache import Cache
from megatron_taipan.model.gate_settings import GateSettings

if TYPE_CHECKING:
    from megatron_taipan.parallel.context import ContextParallel


@dataclass
class Context:
    """Per-token metadata that all layers of a pass share. b rows of l tokens (the whole sequence, not a shard).

    Under context parallelism the tokens are one piece of each row; positions count in the whole row.
    """

    batch: int
    length: int
    seq_idx: Tensor | None  # [b, l] int32 document of each token, None: one document a row
    position: Tensor  # [l] absolute positions of the tokens
    document_start: Tensor  # [b, l] absolute position at which each token's document begins
    samples: Tensor  # [b] index of each row's sample in the run, for the gate's noise
    step: int | Tensor  # optimizer step, for the gate's noise
    gate: GateSettings
    cache: Cache | None = None
    single: bool = False  # one more token a row; its layers change the cache in place, see Taipan.step
    begin: int = 0  # position of the first token; above 0 with a cache and in a later piece of a row
    pieces: int = 1  # pieces of a row, each of `length` tokens
    rotary: tuple[Tensor, Tensor] | None = None  # the tables of a step, which its first layer with some makes for all
    copies: dict[torch.device, "Context"] = field(default_factory=dict)  # on other devices, see `to`

    def to(self, device: torch.device | int | str, non_blocking: bool = False) -> "Context":
        """The same metadata on a layer's device, where the layers are on several; copied once for each device.

        The cache is the same one, each layer's part of it on the layer's device. accelerate calls this for arguments of
        modules that it placed, as it calls `Tensor.to`.
        """
        position = self.position.to(device, non_blocking=non_blocking)
        if position is self.position:
            return self
        if position.device not in self.copies:
            there = position.device
            self.copies[there] = replace(
                self,
                seq_idx=None if self.seq_idx is None else self.seq_idx.to(there),
                position=position,
                document_start=self.document_start.to(there),
                samples=self.samples.to(there),
                step=self.step.to(there) if isinstance(self.step, Tensor) else self.step,
                gate=self.gate.to(there),
                rotary=None,  # made there, by its first layer with some
                copies={},
            )
        return self.copies[position.device]

    def interval(self, window: int | None, row_stride: int, first: int) -> tuple[Tensor, Tensor]:
        """The keys that each token sees, in a flattened [b, row_stride] key axis whose rows begin at position `first`.

        Returns:
            lo, hi: [b, l] int32, both ends included.
        """
        row = torch.arange(self.batch, device=self.position.device)[:, None] * row_stride - first
        lowest = self.document_start
        if window is not None:
            lowest = torch.maximum(lowest, self.position - window + 1)
        return (row + lowest).int(), (row + self.position).int()


def step_context(tokens: Tensor, cache: Cache, gate: GateSettings) -> Context:
    """The metadata of one more token a row [b, 1] of the cached documents, after `cache.advance()`.

    Everything is on the device; nothing depends on how many tokens came before.
    """
    b = tokens.shape[0]
    samples = torch.arange(b, device=tokens.device)  # of the noise of random gates
    assert cache.position is not None and cache.document_start is not None  # by `advance`
    return Context(b, 1, None, cache.position, cache.document_start[:, None], samples, 0, gate, cache, single=True)


def make_context(
    tokens: Tensor,
    seq_idx: Tensor | None,
    samples: Tensor | None,
    step: int | Tensor,
    gate: GateSettings,
    cache: Cache | None = None,
    place: "ContextParallel | None" = None,
    document_start: Tensor | None = None,
) -> Context:
    """Works out positions and document starts; makes the cache forget rows whose document ended.

    Args:
        tokens: [b, l]; seq_idx: [b, l] or None; samples: [b] or None (rows count from 0).
        place: the tokens are this piece of their rows.
        document_start: [b] then the position in its row at which the document of the piece's first token begins.
    """
    b, l = tokens.shape
    device = tokens.device
    past = cache.length if cache is not None else 0
    if place is not None:
        if cache is not None or document_start is None:
            raise ValueError("a piece of a row needs the start of its first document, and cannot extend a cache")
        past = place.rank * l
    position = torch.arange(past, past + l, device=device)
    if samples is None:
        samples = torch.arange(b, device=device)
    before = cache if past else None  # the cache, where it holds tokens
    began = torch.full((b,), past, device=device) if document_start is None else document_start.to(device)
    if before is not None:
        assert before.document_start is not None
        began = before.document_start.to(device)
    if seq_idx is None:
        start = began[:, None].expand(b, l)
    else:
        fresh = torch.ones(b, l, dtype=torch.bool, device=device)  # tokens that begin a document
        fresh[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        if before is not None:
            assert before.last_seq_idx is not None
            fresh[:, 0] = seq_idx[:, 0] != before.last_seq_idx.to(device)
            before.forget(fresh[:, 0])
        elif place is not None:
            fresh[:, 0] = began == past
        start = torch.where(fresh, position, began[:, None]).cummax(1).values
    if cache is not None:
        cache.length += l
        cache.document_start = start[:, -1]
        if seq_idx is not None:
            cache.last_seq_idx = seq_idx[:, -1]
        elif not past:
            cache.last_seq_idx = torch.zeros(b, dtype=torch.int32, device=device)
    pieces = 1 if place is None else place.size
    return Context(b, l, seq_idx, position, start, samples, step, gate, cache, begin=past, pieces=pieces)
