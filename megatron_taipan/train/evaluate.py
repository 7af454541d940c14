"""Loss on held-out text during training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.data.loader import SampleDataset, make_loader
from megatron_taipan.engine.protocol import Engine, layer_metrics
from megatron_taipan.gate_config import GateConfig
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.train.positions import part_names, positions, split_by_position
from megatron_taipan.train.step import Batch, collect, with_batch_budget


@dataclass
class Evaluation:
    """Results over a fixed set of validation samples; the same on every rank and in every layout."""

    ce: float  # mean cross entropy per unmasked token, nats
    perplexity: float
    tokens: int  # unmasked tokens it is the mean of
    layer_metrics: dict[str, float]  # means over tokens, by names such as "layers.5.selected"
    # mean cross entropy and count of the unmasked tokens by position, such as "32-63" (positions.py)
    positions: dict[str, tuple[float, int]] = field(default_factory=dict)


def mean_evaluation(parts: list[Evaluation]) -> Evaluation:
    """Several sets as one; each counts by its tokens."""
    if len(parts) == 1:
        return parts[0]
    tokens = sum(part.tokens for part in parts)
    shares = [part.tokens / max(tokens, 1) for part in parts]
    ce = math.fsum(share * part.ce for share, part in zip(shares, parts, strict=True))
    measured = {
        name: math.fsum(share * part.layer_metrics[name] for share, part in zip(shares, parts, strict=True))
        for name in parts[0].layer_metrics
    }
    positions = {}
    for name in dict.fromkeys(name for part in parts for name in part.positions):
        found = [part.positions[name] for part in parts if name in part.positions]
        count = sum(n for _, n in found)
        positions[name] = (math.fsum(loss * n for loss, n in found) / count, count)
    return Evaluation(ce, math.exp(min(ce, 700.0)), tokens, measured, positions)


@torch.no_grad()
def evaluate(
    engine: Engine, dataset: SampleDataset, *, samples: int, micro_batch: int, groups: Groups, device: torch.device,
    gate: GateConfig, beat: Callable[[], None] = lambda: None,
) -> Evaluation:  # fmt: skip
    """Runs the first `samples` samples (at most one epoch) through the network in evaluation mode.

    Every rank runs the same number of micro-batches, since ZeRO-3 gathers parameters along the way. In the last round
    some hold fewer rows (only the wanted ones, or one that does not count): padding would change the gates' means.

    Args:
        gate: with a budget of the batch all samples count as one batch; C is the final value of its schedule.
        beat: called after every micro-batch, so that a long evaluation is not taken for a hang.
    """
    samples = min(samples, len(dataset))
    together = micro_batch * groups.data_size
    loader = make_loader(
        dataset, start=0, global_batch=together, micro_batch=micro_batch, dp_rank=groups.data_rank,
        dp_size=groups.data_size,
    )  # fmt: skip
    begin = dataset.piece.positions(dataset.seq_len).start
    engine.eval()
    sums = None
    for _ in range(-(-samples // together)):
        batch = next(loader)
        rows = int((batch["sample"] < samples).sum())  # samples rise along a micro-batch
        batch = {name: value[: max(rows, 1)].to(device) for name, value in batch.items()}
        mask = batch["loss_mask"] * (rows > 0)
        at = positions(batch["seq_idx"], begin, batch.get("document_start"))
        parts = split_by_position(at, dataset.seq_len)
        scored, by_part = _score(engine, batch, mask, parts, groups)
        weights = mask.flatten().double()
        counts = torch.stack([weights.sum(), *(weights[part].sum() for part in parts)])
        count = torch.full((1,), rows, dtype=torch.float64, device=device)
        values = torch.cat([counts, count, scored[1:2], by_part, scored[3:] * rows])
        sums = values if sums is None else sums + values
        beat()
    engine.train()
    assert sums is not None  # a dataset has a sample
    dist.all_reduce(sums, group=groups.zero_group)
    n = len(parts)
    if groups.pipeline_size > 1:
        sums = _join_stages(sums, n + 2, groups)
    (tokens, *part_tokens, counted), (ce_sum, *part_sums), totals = (
        part.tolist() for part in sums.split([n + 2, n + 1, len(sums) - 2 * n - 3])
    )
    ce = ce_sum / max(tokens, 1)
    by_position = zip(part_names(dataset.seq_len), part_sums, part_tokens, strict=False)
    names = layer_metrics(engine)
    measured = names.named([total / max(counted, 1) for total in totals])
    if gate.budget != "row":
        measured = with_batch_budget(names, measured, gate.final_capacity, gate.budget)
    return Evaluation(
        ce=ce,
        perplexity=math.exp(min(ce, 700.0)),
        tokens=int(tokens),
        layer_metrics=measured,
        positions={name: (total / some, int(some)) for name, total, some in by_position if some},
    )


def _score(
    engine: Engine, batch: Batch, mask: Tensor, parts: Sequence[Tensor], groups: Groups
) -> tuple[Tensor, Tensor]:
    """Of one micro-batch [loss, ce, budget, layers' metrics], and the cross entropies of the parts of its tokens;
    entries of other stages are 0."""
    if groups.pipeline_size > 1:
        from megatron_taipan.engine.pipeline import score_pipeline, staged

        return score_pipeline(staged(engine), batch, mask, parts)
    out = engine(
        batch["tokens"], labels=batch["labels"], loss_mask=mask, seq_idx=batch["seq_idx"], samples=batch["sample"],
        document_start=batch.get("document_start"), ce_scale=1.0, parts=parts,
    )  # fmt: skip
    return collect(out), out.ce_parts.double()


def _join_stages(sums: Tensor, counts: int, groups: Groups) -> Tensor:
    """Adds up the stages' parts of [counts, cross entropies, layers' metrics ...]; all of them counted tokens and
    rows."""
    joined = sums.clone()
    dist.all_reduce(joined)
    joined /= groups.mesh.size("data", "context", "tensor")
    joined[:counts] = sums[:counts]
    return joined
