"""The losses of long rows, in memory that does not grow with all of their tokens.

One process reads a row in chunks through the decoding cache: memory is that of one chunk and of the cache, whose size
does not depend on the length but in layers of full attention. Ranks that hold a piece of the row each read it in one
pass without a cache: memory is that of one layer over the piece, since nothing is kept for gradients.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.data.batch import Batch
from megatron_taipan.model.taipan import Taipan

CHUNK = 2048  # tokens a pass; the logits of one take 4 bytes x rows x CHUNK x vocabulary
AT_ONCE = 1 << 15  # tokens of a row that tasks which read whole rows take in one pass; longer rows go through the cache
CHUNK_ELEMENTS = 1 << 25  # log probabilities held at once: 128 MiB in float32


@torch.inference_mode()
def losses_in_chunks(model: Taipan, rows: Batch, chunk: int = CHUNK) -> Iterator[tuple[int, Tensor]]:
    """Cross entropies of a batch in evaluation mode, chunk by chunk: the position of its first token in the rows, and
    float32 [b, n], n at most `chunk`, on the model's device.

    Args:
        rows: tokens, labels, seq_idx [b, l] and sample [b], as `SampleDataset.batch` gives them; what loss_mask leaves
            out is the caller's.
        chunk: tokens of a row in each pass; bounds the memory, changes nothing else.
    """
    device = next(model.parameters()).device
    tokens, labels, seq_idx = (rows[name] for name in ("tokens", "labels", "seq_idx"))
    samples = rows["sample"].to(device)  # what a random gate draws by
    cache = model.new_cache(len(tokens))
    was_training = model.training
    model.eval()
    try:
        for first in range(0, tokens.shape[1], chunk):
            part = slice(first, first + chunk)
            inputs, wanted, document = (t[:, part].to(device) for t in (tokens, labels, seq_idx))
            logits = model(inputs, seq_idx=document, samples=samples, cache=cache).logits  # [b, n, v]
            losses = cross_entropies(logits.flatten(0, 1), wanted.flatten()).view_as(wanted)
            del logits  # before the next ones are made
            yield first, losses
    finally:
        model.train(was_training)


@torch.inference_mode()
def losses_of_piece(model: Taipan, rows: Batch, parts: Sequence[Tensor]) -> Tensor:
    """Summed cross entropies of parts of this rank's pieces of a batch, in evaluation mode: float64 [parts] on the CPU.
    Collective over the ranks with the other pieces.

    Args:
        rows: with document_start, as `SampleDataset.batch` gives pieces; loss_mask weighs the tokens.
        parts: indices of tokens, [n_i] of all b * l flattened. The logits of one part are the most that are made at
            once, and its sum is of float32, so parts of a few thousand tokens lose nothing.
    """
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in rows.items()}
    was_training = model.training
    model.eval()
    try:
        out = model(
            given["tokens"], labels=given["labels"], loss_mask=given["loss_mask"], seq_idx=given["seq_idx"],
            samples=given["sample"], document_start=given["document_start"], ce_scale=1.0,
            parts=[part.to(device) for part in parts],
        )  # fmt: skip
    finally:
        model.train(was_training)
    return out.ce_parts.double().cpu()


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """[n, v], [n] -> [n] cross entropy of each position, with the log probabilities of a few rows at a time."""
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    pairs = zip(logits.split(rows), labels.split(rows), strict=True)
    return torch.cat([F.cross_entropy(some, wanted, reduction="none") for some, wanted in pairs])
