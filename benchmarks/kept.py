"""`python -m benchmarks kept`: what one layer of each kind keeps for its backward pass, tensor by tensor."""

import argparse
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import megatron_taipan
from benchmarks.common import Table, add_preset, preset
from megatron_taipan.config import Config
from megatron_taipan.engine.operations import choose_operations
from megatron_taipan.model.blocks import Block
from megatron_taipan.model.context import make_context
from megatron_taipan.model.gate_settings import settled
from megatron_taipan.model.graphs import split_where_graphs_end
from megatron_taipan.model.stack import residual_stream
from megatron_taipan.model.stream import Stream
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.operations import Ops

PACKAGE = str(Path(megatron_taipan.__file__).parent)


class Kept(NamedTuple):
    """Memory that lives from the forward to the backward pass. Views of one memory are one."""

    shape: tuple[int, ...]  # of the first view that was kept
    dtype: torch.dtype
    bytes: int  # of the whole memory
    where: str  # the line of this package that kept it first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    add_preset(parser)


def run(options: argparse.Namespace) -> None:
    table = Table("kept", options.out)
    config = preset(options)
    tokens = config.train.micro_batch * config.data.seq_len
    layers = kept_by_layers(config, choose_operations(config), "cuda")
    kinds: dict[tuple, list[str]] = {}
    for index, (letter, kept) in enumerate(layers):
        kinds.setdefault((letter, sum(one.bytes for one in kept)), []).append(str(index))
    for (letter, size), indices in kinds.items():
        for one in sorted(layers[int(indices[0])][1], key=lambda one: -one.bytes):
            shape = " x ".join(map(str, one.shape))
            table.add(f"{letter}: {shape} {one.dtype}", bytes_a_token=round(one.bytes / tokens, 1), where=one.where)
        table.add(
            f"{letter}: together", MB=round(size / 1e6, 1), GiB_of_these=round(len(indices) * size / 2**30, 2),
            layers=" ".join(indices),
        )  # fmt: skip
    table.add("all layers", GiB=round(sum(one.bytes for _, kept in layers for one in kept) / 2**30, 2))


def kept_by_layers(config: Config, ops: Ops, device: str) -> list[tuple[str, list[Kept]]]:
    """Each layer's letter, and what it keeps in training besides parameters and what the layer before it keeps.

    Nothing is recomputed by `parallel.recompute`. On the device "meta" nothing is computed, and sizes are as on a GPU.
    A mixer's projections, joined, are among it; in training their parameters adjoin and it is a view of them.
    """
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    with torch.device(device):
        model = Taipan(config.model, ops=ops).to(dtype)
        rows = torch.zeros(config.train.micro_batch, config.data.seq_len, dtype=torch.int32)
        ctx = make_context(rows, rows, None, torch.zeros((), dtype=torch.int64), settled(config.model.gate))
        embedded = torch.zeros(*rows.shape, config.model.d_model, dtype=dtype)
    own = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    found: list[tuple[str, list[Kept]]] = []
    h = residual_stream(embedded, fp32=config.model.residual_fp32)
    for group in split_where_graphs_end(list(model.layers)):
        stream = Stream(h)
        for layer in cast(list[Block], group):
            stream = alone(stream)
            shared = [stream.h.untyped_storage()] if stream.kept else []  # with the layer before
            kept, (stream, _) = kept_by(partial(layer, stream, ctx))
            not_counted = {id(storage) for storage in own + shared}
            found.append((layer.kind.letter, [one for at, one in kept.items() if at not in not_counted]))
        h = stream.total().detach()
    return found


def alone(stream: Stream) -> Stream:
    """The stream without the graph that led to it; a gradient flows to it."""
    h, branch = (None if t is None else t.detach().requires_grad_() for t in stream[:2])
    assert h is not None
    return Stream(h, branch, stream.kept)


def kept_by(forward: Callable[[], Any]) -> tuple[dict[int, Kept], Any]:
    """What the graph of forward() keeps, by the id of its storage; and what it returns."""
    found: dict[int, Kept] = {}
    alive = []  # or an id would be given to another

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        found.setdefault(id(storage), Kept(tuple(t.shape), t.dtype, storage.nbytes(), saving_line()))
        alive.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    return found, result


def saving_line() -> str:
    """The innermost line of this package that is running."""
    for frame, line in traceback.walk_stack(None):
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{line}"
    return ""
