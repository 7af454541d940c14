"""Layers replayed as CUDA graphs: one launch for a group of layers, where Python would launch a few hundred kernels.

A 1.3B model's kernels take less time on a fast GPU than it takes to launch them one by one. A graph holds the launches
of a group's forward pass, another one those of its backward pass (torch.cuda.make_graphed_callables). They require
that nothing depends on the host: shapes are fixed, the optimizer step is a tensor, and the number of picked tokens
stays on the device. NCCL's collectives are recorded like any kernel, so tensor-parallel ranks replay in step.
"""

import warnings
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_taipan.model.blocks import Block
from megatron_taipan.model.context import Context, make_context
from megatron_taipan.model.gate import Gate
from megatron_taipan.model.gate_settings import GateSettings
from megatron_taipan.model.stack import Recompute, run_layers
from megatron_taipan.model.stream import Measured
from megatron_taipan.parallel.context import ContextParallel
from megatron_taipan.parallel.replicated import sum_gradients_ahead
from megatron_taipan.parallel.tensor import TensorParallel

LONGEST = 7  # layers of a group; shorter groups let gradients leave for other ranks earlier
SHORTEST = 4  # each group holds the gradients of the stream that enters and that leaves for itself, 8 bytes an element


class LayerGroup(nn.Module):
    """Consecutive layers as a function of tensors alone, their parameters among them.


    Args:
        into: memory for the stream that leaves, where the next group reads it: nothing is copied between their graphs.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        recompute: Recompute | None,
        tp: TensorParallel,
        place: ContextParallel | None = None,
        into: Tensor | None = None,
    ):
        super().__init__()
        self.place, self.into = place, into
        self.layers, self.recompute, self.tp = nn.ModuleList(layers), recompute, tp
        self.names, self.own = zip(*self.named_parameters(), strict=True)

    def with_parameters(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`forward` with the first n tensors as the parameters, and the others as its arguments."""
        n = len(self.names)
        own = sum_gradients_ahead(self.tp, [p.spec for p in self.own], tensors[:n])
        return functional_call(self, dict(zip(self.names, own, strict=True)), tensors[n:])

    def forward(
        self, h: Tensor, seq_idx: Tensor, samples: Tensor, step: Tensor, gate: Tensor, start: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """h: [b, l, d] or this rank's shard; seq_idx: [b, l] int32; samples: [b] int64; step: 0-dim int64; gate:
        float32 [4 + S layers], see GateSettings.unpack; start: [b] int64, see `document_start` of `make_context`,
        where the rows are pieces of longer ones.

        Returns:
            h; where layers of the group measure anything, all their metrics [n], and where some have a budget loss its
            sum.
        """
        ctx = make_context(
            seq_idx, seq_idx, samples, step, GateSettings.unpack(gate), place=self.place, document_start=start
        )
        h, found = run_layers(self.layers, h, ctx, self.recompute, self.into)
        return h, *(t for t in Measured.join(found) or () if t is not None)


class GraphedLayers:
    """The layers of a network on one device, for training on micro-batches of one shape.

    Args:
        layers: in order, on the device, where they stay: their parameters may change in place only.
        shape: (b, l) of a micro-batch.
        stream: an example of the residual stream as it enters the layers; its values do not matter.
        recompute: activation checkpointing inside a group.
        tensor_parallel, context_parallel: this rank's place, as the layers know it.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        shape: tuple[int, int],
        stream: Tensor,
        recompute: Recompute | None = None,
        tensor_parallel: TensorParallel | None = None,
        context_parallel: ContextParallel | None = None,
    ):
        self.shape = shape
        self.parameters = [p for layer in layers for p in layer.parameters()]
        self.places = self._places()
        tp = tensor_parallel or TensorParallel()
        parts = split_where_graphs_end(list(layers))
        entering = [stream.clone() for _ in parts]
        leaving = [*entering[1:], None]
        groups = [
            LayerGroup(part, recompute, tp, context_parallel, into) for part, into in zip(parts, leaving, strict=True)
        ]
        b, l = shape
        device = stream.device
        gates = [module for module in layers.modules() if isinstance(module, Gate)]
        self.gates, self.of_batch = len(gates), any(gate.budget != "row" for gate in gates)
        batch_meta: tuple[Tensor, ...] = (
            torch.zeros(b, l, dtype=torch.int32, device=device),
            torch.arange(b, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.ones(4 + self.gates, device=device),
        )
        self.in_pieces = context_parallel is not None
        if self.in_pieces:
            batch_meta += (torch.zeros(b, dtype=torch.int64, device=device),)
        # Recorded with leaves that share the parameters' memory, not with the parameters: hooks keep a parameter's
        # gradient node alive, and it belongs to the stream that it was made on, which must not be recorded.
        example = tuple(
            (
                *(p.detach().requires_grad_() for p in group.own),
                enters.detach().requires_grad_(),
                *(t.clone() for t in batch_meta),
            )
            for group, enters in zip(groups, entering, strict=True)
        )
        recorded = torch.cuda.make_graphed_callables(tuple(group.with_parameters for group in groups), example)
        torch.cuda.empty_cache()  # what the warm-up held: the graphs have their own memory
        self.groups = [partial(run, *group.own) for run, group in zip(recorded, groups, strict=True)]

    def _places(self) -> list[int]:
        return [p.data_ptr() for p in self.parameters]

    def fits(self, ctx: Context) -> bool:
        """Whether this micro-batch can be replayed."""
        if (ctx.batch, ctx.length) != self.shape or ctx.seq_idx is None or ctx.cache is not None:
            return False
        if self.of_batch and ctx.gate.vector is None:
            warnings.warn(
                "a budget of the batch in recorded layers needs a step's settings (Taipan.forward's `gate`): layers"
                " run one by one", stacklevel=2,
            )  # fmt: skip
            return False
        if self._places() != self.places:
            warnings.warn("parameters moved, so the CUDA graphs are out of date: layers run one by one", stacklevel=2)
            return False
        return True

    def __call__(self, h: Tensor, ctx: Context) -> tuple[Tensor, list[Measured]]:
        """As running the layers; the metrics of a group's layers come joined."""
        step = ctx.step if isinstance(ctx.step, Tensor) else torch.full((), ctx.step, device=h.device)
        assert ctx.seq_idx is not None  # by `fits`
        batch_meta = [ctx.seq_idx.int(), ctx.samples.long(), step.long(), ctx.gate.pack(self.gates, h.device)]
        if self.in_pieces:
            batch_meta.append(ctx.document_start[:, 0])
        found = []
        for group in self.groups:
            h, *measured = group(h, *batch_meta)  # type: ignore[misc]
            if measured:
                found.append(Measured(*measured))
        return h, found


def split_where_graphs_end(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Groups of SHORTEST to LONGEST layers, the last one excepted; where it can, one ends after a layer whose kind says
    so (`ends_graph`)."""
    groups: list[list[nn.Module]] = [[]]
    for layer in layers:
        groups[-1].append(layer)
        length, kind = len(groups[-1]), cast(Block, layer).kind
        if length == LONGEST or (length >= SHORTEST and kind.ends_graph):
            groups.append([])
    return [group for group in groups if group]
