"""What a training's passes through the layers were: replays of CUDA graphs, or layers run one by one.

That a network has graphs does not say that it uses them: a micro-batch that does not fit runs one by one, silently.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from megatron_taipan.model.graphs import GraphedLayers
from megatron_taipan.model.taipan import Taipan


@dataclass
class Passes:
    """Forward passes with gradients, each as (rows, tokens a row), in their order."""

    captured: list[tuple[int, int]] = field(default_factory=list)  # what graphs were recorded for
    replayed: list[tuple[int, int]] = field(default_factory=list)
    one_by_one: list[tuple[int, int]] = field(default_factory=list)
    launches: int = 0  # of CUDA graphs, forward and backward passes, one for each group of layers


@contextmanager
def watched_passes() -> Iterator[Passes]:
    """Notes the passes of every network in this process."""
    passes = Passes()
    record, replay, run = GraphedLayers.__init__, GraphedLayers.__call__, Taipan._run_layers
    launch = torch.cuda.CUDAGraph.replay

    def noted_record(self: Any, layers: Any, shape: tuple[int, int], *args: Any, **kwargs: Any) -> None:
        record(self, layers, shape, *args, **kwargs)
        passes.captured.append(shape)

    def noted_replay(self: Any, h: Any, ctx: Any) -> Any:
        passes.replayed.append((ctx.batch, ctx.length))
        return replay(self, h, ctx)

    def noted_run(self: Any, h: Any, ctx: Any) -> Any:
        before = len(passes.replayed)
        result = run(self, h, ctx)
        if self.training and torch.is_grad_enabled() and len(passes.replayed) == before:
            passes.one_by_one.append((ctx.batch, ctx.length))
        return result

    def noted_launch(self: Any) -> None:
        passes.launches += 1
        launch(self)

    with (
        mock.patch.object(GraphedLayers, "__init__", noted_record),
        mock.patch.object(GraphedLayers, "__call__", noted_replay),
        mock.patch.object(Taipan, "_run_layers", noted_run),
        mock.patch.object(torch.cuda.CUDAGraph, "replay", noted_launch),
    ):
        yield passes
