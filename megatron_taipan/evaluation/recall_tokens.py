"""`python -m megatron_taipan.evaluation.recall_tokens MODEL ...`: loss of tokens that the context has shown before.

A token is a recall token when it ends a bigram that occurred earlier in its document: the context holds the answer,
and a model that can look it up predicts it better. arXiv 2312.04927 calls them associative recall hits and finds that
they make most of the difference between attention and recurrent models; it counts only those whose bigram is rare in
training, here all are counted. Classes are distances to the last earlier occurrence: beyond the window of the S and W
layers none of them sees it any more.

All models see the same samples. A cell holds cross entropy in nats and the number of tokens it is the mean of.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_taipan.checkpoint.weights import open_weights
from megatron_taipan.data.batch import Batch
from megatron_taipan.data.loader import SampleDataset
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.chunked import AT_ONCE, cross_entropies, losses_in_chunks
from megatron_taipan.evaluation.perplexity import (
    INPUTS,
    Score,
    mean_score,
    name_data,
    parse_options,
    read_batches,
    read_models,
    scoring_parser,
)
from megatron_taipan.evaluation.results import Row, make_folder, write_results
from megatron_taipan.layer_kinds.registry import kinds_of
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly

EDGES = (64, 512, 2048, 4096)


def recall_distance(tokens: Tensor, labels: Tensor, loss_mask: Tensor, seq_idx: Tensor) -> Tensor:
    """How many tokens ago each position's bigram (token, label) was last seen in its document.

    Positions that are not scored are ignored: their label belongs to another document. What is outside the row does
    not count either, since no model sees it.

    Args:
        tokens, labels, loss_mask, seq_idx: [b, l] each, as `SampleDataset.batch` gives them.

    Returns:
        int64 [b, l], at least 1; 0 where the bigram is new or the position is not scored.
    """
    begins = torch.ones_like(seq_idx, dtype=torch.bool)  # [b, l]
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    document = begins.flatten().cumsum(0)  # [b * l]: every row begins one
    size = 1 + int(torch.maximum(tokens.max(), labels.max()))
    scored = loss_mask.flatten().nonzero()[:, 0]  # [n]
    key = ((document * size + tokens.flatten()) * size + labels.flatten())[scored]  # 2^57 for 8 M tokens of 2^17 ids
    key, order = key.sort(stable=True)  # equal bigrams of a document are next to each other, in the order of the text
    position = scored[order]
    distance = torch.zeros_like(document)
    distance[position[1:]] = torch.where(key[1:] == key[:-1], position[1:] - position[:-1], 0)
    return distance.view_as(tokens)


@dataclass(frozen=True)
class RecallScores:
    """Cross entropies by class: class 0 is new bigrams, class i recall tokens of distance (edges[i - 2], edges[i - 1]],
    the last class those beyond all edges."""

    edges: tuple[int, ...]
    nats: tuple[float, ...]  # [len(edges) + 2] summed cross entropy
    tokens: tuple[int, ...]  # [len(edges) + 2]

    @property
    def total(self) -> Score:
        """What `perplexity.score` gives."""
        return mean_score(sum(self.nats), sum(self.tokens))

    def beyond(self, edge: int) -> tuple[float, int]:
        """Summed cross entropy and number of the recall tokens farther away than one of the edges."""
        first = self.edges.index(edge) + 2
        return sum(self.nats[first:]), sum(self.tokens[first:])


@torch.inference_mode()
def score_by_distance(
    model: Taipan, dataset: SampleDataset, *, samples: int, batch: int = 1, edges: Sequence[int] = EDGES
) -> RecallScores:
    """Cross entropy of the first `samples` samples (at most one epoch) by `recall_distance`, in evaluation mode.

    Args:
        batch: rows per forward pass; changes speed and memory (the logits, 4 bytes x batch x seq_len x vocabulary, and
            as much again in bfloat16; of rows longer than AT_ONCE those of one chunk), not results.
        edges: largest distance of each class, ascending.

    Raises:
        UserError: edges that do not ascend from 1 on, or no token to score.
    """
    edges = tuple(edges)
    if any(high <= low for low, high in itertools.pairwise((0, *edges))):
        raise UserError(f"edges {', '.join(map(str, edges))} must be at least 1 and ascend, each larger than the last")
    was_training = model.training
    model.eval()
    bounds = torch.tensor((0, *edges))
    nats = torch.zeros(len(edges) + 2, dtype=torch.float64)
    counts = torch.zeros(len(edges) + 2, dtype=torch.int64)
    for rows in read_batches(dataset, samples, batch):
        scored = rows["loss_mask"].flatten() > 0  # [b * l]
        kind = torch.bucketize(recall_distance(*(rows[name] for name in INPUTS)), bounds).flatten()[scored]  # [n]
        losses = _losses(model, rows)[scored]  # [n]
        nats += torch.bincount(kind, losses.double(), minlength=len(nats))
        counts += torch.bincount(kind, minlength=len(counts))
    model.train(was_training)
    mean_score(0.0, int(counts.sum()))
    return RecallScores(edges, tuple(nats.tolist()), tuple(counts.tolist()))


def _losses(model: Taipan, rows: Batch) -> Tensor:
    """Cross entropies of all tokens of a batch, [b * l] on the CPU."""
    if rows["tokens"].shape[1] > AT_ONCE:
        found = torch.empty(rows["tokens"].shape)
        for first, losses in losses_in_chunks(model, rows):  # copied: kept, each would hold a piece of the CPU's heap
            found[:, first : first + losses.shape[1]] = losses
        return found.flatten()
    device = next(model.parameters()).device
    tokens, seq_idx, which = (rows[name].to(device) for name in ("tokens", "seq_idx", "sample"))
    logits = model(tokens, seq_idx=seq_idx, samples=which).logits  # [b, l, v]
    return cross_entropies(logits.flatten(0, 1), rows["labels"].flatten().to(device)).cpu()


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = scoring_parser("recall_tokens", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--edges",
        type=int,
        nargs="+",
        help=f"largest distance of each class; default: {', '.join(map(str, EDGES))} and the models' windows",
    )
    parser.add_argument("--out", type=Path, help="folder for recall_tokens.json, .md and .svg")
    options = parse_options(parser, arguments)
    make_folder(options.out)
    edges = options.edges or default_edges([open_weights(path).network for path in options.models])
    names = ["all", "new", *(f"{low + 1}-{high}" for low, high in itertools.pairwise((0, *edges))), f">{edges[-1]}"]
    print(f"{'model':<48}" + "".join(f" {name:>18}" for name in names))
    rows: list[Row] = []
    for label, model, dataset in read_models(options):
        found = score_by_distance(model, dataset, samples=options.samples, batch=options.batch, edges=edges)
        classes = [(sum(found.nats), sum(found.tokens)), *zip(found.nats, found.tokens, strict=True)]
        print(f"{label:<48}" + "".join(f" {cell(*one):>18}" for one in classes), flush=True)
        for name, (nats, tokens) in zip(names, classes, strict=True):
            loss = nats / tokens if tokens else None
            rows.append({"model": label, "distance": name, "cross entropy": loss, "tokens": tokens})
    if options.out is not None:
        about = {"data": name_data(options), "samples": options.samples, "dtype": options.dtype}
        title = "Loss of tokens that the context has shown before, by distance"
        write_results(options.out, "recall_tokens", rows, about=about, title=title)
        draw_figures(options.out, rows)
    return 0


def draw_figures(folder: Path, rows: list[Row]) -> None:
    """Loss by distance and model."""
    from megatron_taipan.evaluation.figures import write_bars

    write_bars(
        folder / "recall_tokens.svg", rows, group="distance", value="cross entropy",
        x="all tokens, new ones, and by tokens since the text has shown it before", y="cross entropy, nats a token",
    )  # fmt: skip


def default_edges(networks: list[ModelConfig]) -> list[int]:
    """EDGES and the window of every network that has layers with one."""
    with_one = [network for network in networks if any(kind.windowed for kind in kinds_of(network.letters))]
    windows = {network.attention.window for network in with_one}
    return sorted({*EDGES, *windows})


def cell(nats: float, tokens: int) -> str:
    """Mean and count, such as `2.3456 12,345`."""
    return f"{nats / tokens:.4f} {tokens:,}" if tokens else "- 0"


if __name__ == "__main__":
    sys.exit(main())
