"""Padding and packing as transformers gives them, turned into documents: a token of Taipan sees only its document."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label that transformers leaves out of the loss


def documents_from_mask(mask: Tensor, rows: int, length: int, past: int = 0) -> Tensor | None:
    """Documents [b, l] int32 of the last l tokens: padding and text are separate documents.

    Args:
        mask: [b, past + l], 0 on padding. With cached tokens also [b, l], all 1.
        rows, length: b and l of the tokens; past: tokens in the cache.

    Returns:
        None where each row continues its cached text.

    Raises:
        ValueError: a mask of another shape, with padding between tokens of a row, or of new tokens only with padding.
    """
    if mask.dim() != 2:
        raise ValueError(f"attention_mask must be [batch, length] of 0 and 1, not {mask.dim()}-dimensional")
    if mask.shape[0] != rows or mask.shape[1] not in (length, past + length):
        raise ValueError(
            f"attention_mask is {list(mask.shape)}, but must be [{rows}, {past + length}]:"
            f" {past} cached tokens and {length} new ones a row"
        )
    text = mask != 0
    if past and mask.shape[1] == length:
        # Only the whole mask says where the cached texts begin; numbered again, all documents would look like others.
        if not bool(text.all()):
            raise ValueError(
                f"attention_mask: with padding it must cover the {past} cached tokens too, not only the {length} new"
            )
        return None
    documents = numbered_by_run(text)
    if mask.shape[1] > 2 and bool(((documents > 1) & text).any()):
        raise ValueError("attention_mask: padding must be at the left or the right end of a row, not inside it")
    return documents[:, -length:]


def documents_from_positions(positions: Tensor, mask: Tensor | None, length: int, cached: bool) -> Tensor | None:
    """Documents [b or 1, l] int32 of packed rows: one begins where the positions do not go on by one.

    No layer uses the positions themselves, only distances inside a document.

    Args:
        positions: [b or 1, l or more], of which the last l count; mask: as in `documents_from_mask`.
        cached: whether a cache is read or made.

    Returns:
        None where no document begins inside a row.

    Raises:
        ValueError: positions of another shape, or packed rows that are padded or cached.
    """
    if positions.dim() != 2 or positions.shape[1] < length:
        raise ValueError(f"position_ids are {list(positions.shape)}, but must be [batch, {length}]")
    positions = positions[:, -length:]
    jumps = positions[:, 1:] != positions[:, :-1] + 1
    if mask is not None:  # generate() gives all padding the same position
        text = mask[:, -length:] != 0
        jumps = jumps & text[:, 1:] & text[:, :-1]
    if not bool(jumps.any()):
        return None
    if cached or mask is not None and not bool(text.all()):
        raise ValueError(
            "position_ids do not go on by one inside a text, as in packed rows, which need seq_idx if padded or cached"
        )
    return F.pad(jumps.cumsum(1, dtype=torch.int32), (1, 0))


def numbered_by_run(seq_idx: Tensor) -> Tensor:
    """Documents [b, l] int32 from any numbers [b, l]: a document is a run of tokens with the same one.

    Callers may give a number twice, as those do who pad packed rows with 0. The layers ask for numbers that do not
    fall: a kernel takes a stretch whose first and last token have the same number for one document.
    """
    return F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1, dtype=torch.int32), (1, 0))


def within_texts(labels: Tensor, mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """The labels [b, l], not shifted, without padding and without first tokens of documents, which are not predicted
    from the document before."""
    if mask is not None:
        labels = labels.masked_fill(mask[:, -labels.shape[1] :].to(labels.device) == 0, IGNORED)
    if seq_idx is not None:
        labels = labels.masked_fill(F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).to(labels.device), IGNORED)
    return labels
