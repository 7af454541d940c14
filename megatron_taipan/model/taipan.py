"""Taipan (arXiv 2410.18572): embedding, a pattern of layers, final norm, head."""

import gc
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_taipan.gate_config import GateConfig
from megatron_taipan.layer_kinds.metrics import LayerMetrics
from megatron_taipan.layer_kinds.registry import kinds_of
from megatron_taipan.model.blocks import make_layers
from megatron_taipan.model.build import Build
from megatron_taipan.model.cache import Cache, new_cache
from megatron_taipan.model.context import Context, make_context, step_context
from megatron_taipan.model.embedding import Embedding, Head
from megatron_taipan.model.flops import model_flops, model_params
from megatron_taipan.model.gate_settings import settings_of, settled
from megatron_taipan.model.graphs import GraphedLayers
from megatron_taipan.model.layers import RMSNorm
from megatron_taipan.model.recompute import recompute_of
from megatron_taipan.model.stack import residual_stream, run_layers, total_budget, training_loss
from megatron_taipan.model.stream import Measured
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.ops.dispatch import Ops, pick_ops
from megatron_taipan.ops.tiles import fit_tiles
from megatron_taipan.parallel.context import ContextParallel
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.parameters import parameter_table


class TaipanOutput(NamedTuple):
    """What a forward pass gives. A tuple, because ZeRO-3 hooks only tensors that it finds in tuples, lists, dicts."""

    logits: Tensor | None = None  # [b, l, vocab] float32, without labels
    loss: Tensor | None = None  # ce_loss + budget_lambda * budget_loss
    ce_loss: Tensor | None = None  # sum of masked cross entropies times ce_scale
    budget_loss: Tensor | None = None  # sum over S layers of (capacity - selected fraction)^2, see GateConfig.budget
    metrics: Tensor | None = None  # [n] float32, detached: of all layers, see Taipan.named_metrics
    ce_parts: Tensor | None = None  # [number of parts]: ce_loss of each part of the tokens, where they were given


class Taipan(nn.Module):
    """The network of a ModelConfig, or one tensor rank's part of it.

    Parameters are float32, drawn from (seed, name). Under `torch.device("meta")` only shapes are made.

    Args:
        seed: of the initial weights and of the gate's noise.
        tensor_parallel: this rank's place; None: the whole network.
        context_parallel: which piece of its rows this rank holds; None: whole rows.
        ops: implementations; None: the fast ones where they run.
        recompute: "none", "selective" or "full" activation checkpointing; "full" in segments of recompute_every layers.

    Raises:
        UserError: the network cannot be split over that many tensor ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        tensor_parallel: TensorParallel | None = None,
        context_parallel: ContextParallel | None = None,
        ops: Ops | None = None,
        recompute: str = "none",
        recompute_every: int = 1,
    ):
        super().__init__()
        self.config, self.tp, self.ops = config, tensor_parallel or TensorParallel(), ops or pick_ops()
        self.place = context_parallel
        self.recompute, self.recompute_every = recompute, recompute_every
        self.layer_metrics = LayerMetrics(config)
        self.graphs: GraphedLayers | None = None  # set by `capture`
        self.weight_moves = 0  # how often the weights were moved to be read together (inference/stepping.py)
        build = Build(config, parameter_table(config, self.tp.size), seed, self.tp, self.ops, self.place)
        self.embedding = Embedding(build, "embedding")
        self.layers = make_layers(build)
        self.final_norm = RMSNorm(build, "final_norm")
        self.head = Head(build, "head")

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        samples: Tensor | None = None,
        document_start: Tensor | None = None,
        step: int | Tensor = 0,
        ce_scale: Tensor | float | None = None,
        gate: Tensor | None = None,
        cache: Cache | None = None,
        all_logits: bool = True,
        parts: Sequence[Tensor] | None = None,
    ) -> TaipanOutput:
        """One pass over b rows of l tokens.

        Args:
            tokens: [b, l] ids.
            labels: [b, l] the id that each position should predict; given: a loss comes back, else logits.
            loss_mask: [b, l] weight of each position's cross entropy; None: all 1.
            seq_idx: [b, l] int32, non-decreasing document numbers; documents never see each other. Left padding is its
                own document.
            samples: [b] each row's index in the run, and step, the optimizer step: counters of the gate's noise.
            document_start: [b] under context parallelism: the position in its row at which the document of the piece's
                first token begins.
            ce_scale: factor of the summed cross entropy; None: 1 / sum(loss_mask). A trainer passes the factor of
                its whole global batch, so that the loss does not depend on how the batch is split.
            gate: float32 [4 + S layers], the gates' settings of a training step (GateSettings.unpack); None: the
                last values of the configuration's schedules.
            cache: state of earlier tokens, extended in place.
            all_logits: False: logits of the last position only, [b, 1, vocab].
            parts: indices of tokens, of all b * l flattened; every token in one of them. With labels: cross entropies
                by part.
        """
        settings = settings_of(self.config.gate, gate, step)
        ctx = make_context(tokens, seq_idx, samples, step, settings, cache, self.place, document_start)
        h, found = self._run_layers(self.embedding(tokens), ctx)
        measured = Measured.join(found)
        metrics = measured.metrics if measured else None
        if labels is None:
            h = self.tp.gather_sequence(h).view(*tokens.shape, -1)
            h = self.final_norm(h if all_logits else h[:, -1:])
            return TaipanOutput(logits=self.head(h, self.embedding.weight, None, None), metrics=metrics)
        h = self.final_norm(h)
        mask = torch.ones_like(tokens, dtype=torch.float32) if loss_mask is None else loss_mask
        scale = 1.0 / mask.sum() if ce_scale is None else ce_scale
        ce_loss = self.head(h, self.embedding.weight, labels, mask * scale, parts)
        ce_parts = None
        if parts is not None:
            ce_parts, ce_loss = ce_loss, ce_loss.sum()
        budget_loss = total_budget(found, ce_loss.device)
        loss = training_loss(ce_loss, budget_loss, settings.budget_lambda)
        return TaipanOutput(loss=loss, ce_loss=ce_loss, budget_loss=budget_loss, metrics=metrics, ce_parts=ce_parts)

    def named_metrics(self, output: TaipanOutput) -> dict[str, Tensor]:
        """What the layers measured in a pass, 0-dim tensors by names such as `layers.5.selected`."""
        return {} if output.metrics is None else self.layer_metrics.named(output.metrics.unbind())

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [b, vocab] after one more token a row, tokens [b, 1], of the documents that `cache` holds.

        As `forward` with the cache, for evaluation on one tensor rank. The work on the device is the same launches at
        the same addresses whatever came before, so it can be captured (inference/stepping.py).
        """
        cache.advance()
        return self.step_on_device(tokens, cache)

    def step_on_device(self, tokens: Tensor, cache: Cache) -> Tensor:
        """`step` without what the host does first, `cache.advance()`."""
        if self.tp.size > 1 or self.training:
            raise ValueError("Taipan.step decodes on one tensor rank, in evaluation mode")
        h, _ = self._run_layers(self.embedding(tokens), step_context(tokens, cache, settled(self.config.gate)))
        return self.head(self.final_norm(h), self.embedding.weight, None, None)[:, 0]

    def _run_layers(self, h: Tensor, ctx: Context) -> tuple[Tensor, list[Measured]]:
        """The residual stream through all layers, and what they measured."""
        if self.graphs is not None and self.training and torch.is_grad_enabled() and self.graphs.fits(ctx):
            return self.graphs(h, ctx)
        return run_layers(self.layers, h, ctx, recompute_of(self.recompute, self.recompute_every, self.tp))

    @property
    def graphable(self) -> bool:
        """Whether no layer needs the host on a GPU: references of attention and of picking rows read numbers there, and
        so may kernels of other projects."""
        kinds = kinds_of(self.config.letters)
        fits = fit_tiles(self.config.head_dim) or not any(kind.attends for kind in kinds)
        fits = fits and not self.ops.unrecordable
        return fits and {"interval_attention", "select_rows"} <= self.ops.kernels and all(k.capturable for k in kinds)

    def capture(self, batch: int, length: int) -> None:
        """Lets training on [batch, length] micro-batches with seq_idx replay CUDA graphs (see model/graphs.py).

        Call it once the network is on its GPU and its parameters are where they will stay; under tensor parallelism
        on all ranks.
        """
        weight = self.embedding.weight
        shape = self.tp.stream_shape(batch, length, self.config.d_model)
        embedded = torch.ones(shape, device=weight.device, dtype=weight.dtype)
        stream = residual_stream(embedded, fp32=self.config.residual_fp32)
        recompute = recompute_of(self.recompute, self.recompute_every, self.tp)
        self.graphs = GraphedLayers(self.layers, (batch, length), stream, recompute, self.tp, self.place)

    def use_context(self, place: ContextParallel | None) -> None:
        """Another place among pieces of rows, for all layers; what `capture` recorded is out of date then."""
        for module in self.modules():
            if hasattr(module, "place"):
                setattr(module, "place", place)  # noqa: B010

    def use_gate(self, gate: GateConfig) -> None:
        """Other schedules of the gate; a pass without a trainer's settings takes their last values."""
        self.config = self.config.model_copy(update={"gate": gate})

    def release_graphs(self) -> None:
        """Forgets what `capture` recorded. NCCL hangs when it leaves a communicator that a graph still holds."""
        self.graphs = None
        gc.collect()  # torch's recorded functions refer to each other

    def new_cache(self, batch: int, device=None, dtype=None) -> Cache:
        """An empty cache for decoding `batch` rows.

        Args:
            dtype: of the cached keys, values and convolution inputs; None: the embedding's.
        """
        weight = self.embedding.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return new_cache(self.layers, batch, [device] * len(self.layers), dtype)

    def num_params(self) -> int:
        """Parameters of the whole network, over all tensor ranks, shared ones once."""
        return model_params(self.config)

    def num_flops_per_token(self, seq_len: int) -> float:
        """Forward operations per token of the whole network (see model/flops.py)."""
        return model_flops(self.config, seq_len)
