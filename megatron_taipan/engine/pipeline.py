"""Taipan as DeepSpeed pipeline stages: the same layers, cut by the pattern's `|` or balanced by operations.

Stages send each other a tuple of three tensors:

    h       [b, l, d]    the residual stream (a shard of its tokens under sequence parallelism)
    budget  [1]          budget losses of the S layers so far
    batch_meta   [b, l, 6]    int64: token, seq_idx, label, bits of the float32 token weight, sample, step

What has no gradient comes last: a stage between two others receives the n-th gradient into the memory that it made for
the n-th tensor, and DeepSpeed compares only its size, not its type.

Within a stage a fourth tensor may follow: what the next norm is to add to h (model/stream.py).

The labels are sent along, because head and loss are one operation that never holds the logits; `batch_meta` is 48
bytes a token beside the 4 d of the stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_taipan.config import Config
from megatron_taipan.engine.protocol import Engine
from megatron_taipan.gate_config import GateConfig
from megatron_taipan.layer_kinds.metrics import LayerMetrics
from megatron_taipan.model.blocks import Block, make_layer
from megatron_taipan.model.build import Build
from megatron_taipan.model.context import make_context
from megatron_taipan.model.embedding import Embedding, Head
from megatron_taipan.model.flops import model_flops, model_params, pipeline_bounds
from megatron_taipan.model.gate_settings import settings_of
from megatron_taipan.model.layers import RMSNorm
from megatron_taipan.model.recompute import recompute_of
from megatron_taipan.model.stack import Recompute, training_loss
from megatron_taipan.model.stream import Stream
from megatron_taipan.ops.dispatch import Ops
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.parameters import parameter_table

Payload = tuple[Tensor, ...]


class TaipanPipeline(PipelineModule):
    """All stages; each process builds its own layers only. The output of the last stage is the loss.

    Raises:
        UserError: the cuts do not fit the number of stages.
    """

    graphable = False  # no CUDA graphs: DeepSpeed's schedule keeps several micro-batches under way

    def __init__(self, config: Config, groups: Groups, ops: Ops):
        table = parameter_table(config.model, groups.tensor.size)
        build = Build(config.model, table, config.train.seed, groups.tensor, ops)
        self.bounds = pipeline_bounds(config.model, config.data.seq_len, config.parallel.pipeline)
        self.pipeline_rank = groups.pipeline_rank  # before super().__init__, which asks for this stage's layers
        tied = config.model.tie_embeddings
        embedding: Any = LayerSpec(PipelineEmbedding, build)
        head: Any = LayerSpec(PipelineHead, build, config)
        if tied:
            embedding = TiedLayerSpec("embedding", EmbeddingAndHead, build, config)
            head = TiedLayerSpec("embedding", EmbeddingAndHead, build, config, forward_fn=EmbeddingAndHead.score)
        last = [i + 1 in self.bounds for i in range(config.model.n_layers)]
        recompute = recompute_of(config.parallel.recompute, 1, groups.tensor)
        layers = [LayerSpec(PipelineLayer, build, config, recompute, i, ends) for i, ends in enumerate(last)]
        super().__init__(
            [embedding, *layers, LayerSpec(PipelineNorm, build), head],
            topology=PipeModelDataParallelTopology(
                num_pp=groups.mesh.pipeline, num_mp=groups.mesh.tensor, num_dp=groups.zero_size
            ),
            loss_fn=None,
        )
        self.config, self.tp, self.ops = config, groups.tensor, ops
        self.layer_metrics = LayerMetrics(config.model)
        self.records_on = next(self.parameters()).device

    def _partition_layers(self, method: str = "") -> None:
        """Stage s holds specs parts[s] to parts[s + 1] - 1; the embedding is the first spec, norm and head the last."""
        self.parts = [0, *(bound + 1 for bound in self.bounds[1:-1]), len(self._layer_specs)]
        self._set_bounds(start=self.parts[self.pipeline_rank], stop=self.parts[self.pipeline_rank + 1])

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        """Parameters by their names in the whole network, so that optimizer and checkpoints know no stages."""
        for _, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield parameter.full_name, parameter

    def named_buffers(self, *args: Any, **kwargs: Any):
        """This stage's buffers by their names in the whole network."""
        for module in self.modules():
            if isinstance(module, PipelineLayer):
                for name, buffer in module.layer.named_buffers():
                    yield f"layers.{module.index}.{name}", buffer

    def modules_by_full_name(self) -> Iterator[tuple[str, nn.Module]]:
        """This stage's modules by their names in the whole network."""
        for module in self.modules():
            if isinstance(module, PipelineLayer):
                yield from module.layer.named_modules(prefix=f"layers.{module.index}")
            elif isinstance(module, PipelineEmbedding):
                yield "embedding", module
            elif isinstance(module, PipelineNorm):
                yield "final_norm", module

    def take_records(self) -> Tensor:
        """What this stage saw since the last call, as means over micro-batches; and clears it.

        Returns:
            [3 + n] float64: loss, ce, budget, then the metrics of all layers of the network, in the order of
            `layer_metrics`. Entries that other stages hold are 0, so that a sum over stages joins them.
        """
        losses = torch.zeros(3, dtype=torch.float64, device=self.records_on)
        metrics = torch.zeros(len(self.layer_metrics.names), dtype=torch.float64, device=self.records_on)
        for owner in self.recorders():
            if owner.records:
                place = losses if isinstance(owner, PipelineHead) else metrics[self.layer_metrics.spans[owner.index]]
                place.copy_(torch.stack(owner.records).mean(0))
                owner.records.clear()
        return torch.cat([losses, metrics])

    def recorders(self) -> "list[PipelineHead | PipelineLayer]":
        """The layers of this stage that keep records."""
        return [m for m in self.modules() if isinstance(m, PipelineHead | PipelineLayer)]

    @contextmanager
    def gates_set_to(self, gate: Tensor | None) -> Iterator[None]:
        """The gates' settings (see Taipan.forward) that this stage's layers use meanwhile; every stage is given the
        same ones, so none are sent between stages."""
        for owner in self.recorders():
            owner.gate = gate
        try:
            yield
        finally:
            for owner in self.recorders():
                owner.gate = None

    @contextmanager
    def scored_by(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Cross entropies of one micro-batch by part of its tokens (see Taipan.forward): float64 [number of parts],
        which its forward pass fills in on the last stage; 0 on the others."""
        sums = torch.zeros(len(parts), dtype=torch.float64, device=self.records_on)
        heads = [owner for owner in self.recorders() if isinstance(owner, PipelineHead)]
        for head in heads:
            head.parts, head.sums = parts, sums
        try:
            yield sums
        finally:
            for head in heads:
                head.parts = head.sums = None

    def use_gate(self, gate: GateConfig) -> None:
        """Other schedules of the gate, as Taipan.use_gate."""
        for owner in self.recorders():
            owner.gate_config = gate

    def num_params(self) -> int:
        """Parameters of the whole network."""
        return model_params(self.config.model)

    def num_flops_per_token(self, seq_len: int) -> float:
        """Forward operations per token of the whole network."""
        return model_flops(self.config.model, seq_len)


@runtime_checkable
class StagedEngine(Engine, Protocol):
    """An engine whose network is a `TaipanPipeline`: DeepSpeed's schedule moves micro-batches through the stages."""

    @property
    def module(self) -> TaipanPipeline:
        """This process's stage."""

    def train_batch(self, data_iter: Iterator[Any]) -> Any:
        """A global batch forward and backward, and the update."""

    def eval_batch(self, data_iter: Iterator[Any], *, num_micro_batches: int, bcast_loss: bool) -> Any:
        """Forward passes only."""

    def train_micro_batch_size_per_gpu(self) -> int:
        """Rows for which the stages have buffers."""

    def reset_activation_shape(self) -> Any:
        """Makes these buffers again, for the shape that comes next."""


def staged(engine: Engine) -> StagedEngine:
    """The same engine, of which the caller knows that its network is cut into stages."""
    return cast(StagedEngine, engine)


def run_pipeline(
    engine: StagedEngine, batches: list[dict[str, Tensor]], *, step: int, ce_scale: Tensor, gate: Tensor | None
) -> Tensor:
    """One optimizer step over micro-batches; this stage's records (see `take_records`)."""
    engine.module.take_records()
    with engine.module.gates_set_to(gate):
        engine.train_batch(packed(batches, step=step, ce_scale=ce_scale))
    return engine.module.take_records()


@torch.no_grad()
def score_pipeline(
    engine: StagedEngine, batch: dict[str, Tensor], loss_mask: Tensor, parts: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """One micro-batch in evaluation mode: this stage's records, the cross entropy summed over loss_mask [b, l]; and
    that cross entropy by part."""
    engine.module.take_records()
    one = torch.ones((), device=loss_mask.device)
    whole = len(loss_mask) == engine.train_micro_batch_size_per_gpu()
    if not whole:  # the stages have buffers of a whole micro-batch
        engine.reset_activation_shape()
    with engine.module.scored_by(parts) as sums:
        engine.eval_batch(
            packed([batch | {"loss_mask": loss_mask}], step=0, ce_scale=one), num_micro_batches=1, bcast_loss=False
        )
    if not whole:
        engine.reset_activation_shape()
    return engine.module.take_records(), sums


@torch.no_grad()
def repeat_forward(engine: StagedEngine, batch: dict[str, Tensor], *, step: int, gate: Tensor | None) -> Tensor:
    """The forward passes of one micro-batch of a training step again, the gate's noise included; the records."""
    engine.module.take_records()
    one = torch.ones((), device=batch["loss_mask"].device)
    engine.module.eval = lambda: engine.module  # eval_batch would leave the training mode, and with it the noise
    try:
        with engine.module.gates_set_to(gate):
            engine.eval_batch(packed([batch], step=step, ce_scale=one), num_micro_batches=1, bcast_loss=False)
    finally:
        del engine.module.eval
    return engine.module.take_records()


def pack_batch(batch: dict[str, Tensor], *, step: int, ce_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A micro-batch as (batch_meta, labels) for the engine's data iterator; DeepSpeed asks for the second."""
    weights = (batch["loss_mask"] * ce_scale).float()
    shape = batch["tokens"].shape
    batch_meta = torch.stack(
        [
            batch["tokens"],
            batch["seq_idx"].long(),
            batch["labels"],
            weights.view(torch.int32).long(),
            batch["sample"].long()[:, None].expand(shape),
            torch.full(shape, step, dtype=torch.int64, device=batch["tokens"].device),
        ],
        -1,
    )
    return batch_meta, batch["labels"]


def packed(batches: list[dict[str, Tensor]], *, step: int, ce_scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The data iterator of one `train_batch`."""
    return iter([pack_batch(batch, step=step, ce_scale=ce_scale) for batch in batches])


class PipelineEmbedding(Embedding):
    """First layer: batch_meta -> (h, budget, batch_meta)."""

    def __init__(self, build: Build):
        super().__init__(build, "embedding")

    def forward(self, batch_meta: Tensor) -> Payload:
        h = super().forward(batch_meta[..., 0])
        # a leaf that requires a gradient: DeepSpeed sends one back for every floating-point tensor
        return (
            h,
            torch.zeros(1, dtype=torch.float32, device=h.device, requires_grad=torch.is_grad_enabled()),
            batch_meta,
        )


class PipelineLayer(nn.Module):
    """One layer of the pattern.

    Args:
        recompute: activation checkpointing, as in `run_layers`; here always layer by layer.
        ends: whether it is the last one of its stage.
    """

    def __init__(self, build: Build, config: Config, recompute: Recompute | None, index: int, ends: bool):
        super().__init__()
        self.ends, self.recompute = ends, recompute
        self.index, self.packed = index, config.data.mask_documents
        self.layer: Block = make_layer(build, index)
        self.gate_config = config.model.gate
        self.gate: Tensor | None = None  # set by `gates_set_to`
        self.records: list[Tensor] = []  # its metrics of each micro-batch

    def forward(self, payload: Payload) -> Payload:
        h, budget, batch_meta, *branch = payload
        stream = Stream(h, branch[0] if branch else None)
        step = batch_meta[0, 0, 5]
        settings = settings_of(self.gate_config, self.gate, step)
        ctx = make_context(
            batch_meta[..., 0], batch_meta[..., 1].int() if self.packed else None, batch_meta[:, 0, 4], step, settings
        )
        if self.recompute is None or not torch.is_grad_enabled():
            stream, measured = self.layer(stream, ctx)
        else:  # the input of a recomputed layer is kept: one tensor, not two
            stream, measured = self.recompute.run(self.layer, Stream(stream.total()), ctx)
        if measured is not None:
            budget = budget if measured.budget_loss is None else budget + measured.budget_loss
            self.records.append(measured.metrics.detach().double())
        if self.ends or stream.branch is None:
            return stream.total(), budget, batch_meta
        return stream.h, budget, batch_meta, stream.branch


class PipelineNorm(RMSNorm):
    """The final norm."""

    def __init__(self, build: Build):
        super().__init__(build, "final_norm")

    def forward(self, payload: Payload) -> Payload:
        h, budget, batch_meta = payload
        return super().forward(h), budget, batch_meta


class PipelineHead(Head):
    """Last layer: (h, budget, batch_meta) -> loss, with its own weight or the tied embedding's."""

    def __init__(self, build: Build, config: Config):
        super().__init__(build, "head")
        self.gate_config = config.model.gate
        self.gate: Tensor | None = None  # set by `gates_set_to`
        self.records: list[Tensor] = []  # [loss, ce, budget] of each micro-batch
        self.parts: Sequence[Tensor] | None = None  # set by `scored_by`, and where their sums go
        self.sums: Tensor | None = None

    def forward(self, payload: Payload, embedding: Tensor | None = None) -> Tensor:
        h, budget, batch_meta = payload
        weights = batch_meta[..., 3].int().view(torch.float32)
        ce_loss = super().forward(h, embedding, batch_meta[..., 2], weights, self.parts)
        if self.sums is not None:
            self.sums.copy_(ce_loss)
            ce_loss = ce_loss.sum()
        loss = training_loss(ce_loss, budget[0], settings_of(self.gate_config, self.gate).budget_lambda)
        self.records.append(torch.stack([t.detach().double() for t in (loss, ce_loss, budget[0])]))
        return loss


class EmbeddingAndHead(PipelineEmbedding):
    """Embedding and head that share their weight, each used on its own stage."""

    def __init__(self, build: Build, config: Config):
        super().__init__(build)
        self.head = PipelineHead(build, config)

    def score(self, payload: Payload) -> Tensor:
        return self.head(payload, self.weight)
