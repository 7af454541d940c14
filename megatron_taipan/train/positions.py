"""Parts of validation rows by how far a token can look back, so that the loss shows what a model makes of context."""

import torch
from torch import Tensor

MOST = 8  # parts; those of longer rows begin with a wider one
LEAST = 16  # tokens of the first part: fewer would differ from run to run by chance alone


def borders(length: int) -> list[int]:
    """Where the parts after the first begin, in rows of `length` tokens: powers of two, the last in the second half.

    So parts that rows of two lengths have in common are of the same positions: of 4,096 tokens 32, 64, ..., 2,048, of
    32,768 tokens 256, ..., 16,384.
    """
    top = (1 << (length - 1).bit_length()) >> 1  # the largest below length
    return [top >> k for k in reversed(range(MOST - 1)) if top >> k >= LEAST]


def part_names(length: int) -> list[str]:
    """For each part its first and last position, such as `0-31`; none where rows are too short for two parts."""
    starts = borders(length)
    return (
        [f"{first}-{last - 1}" for first, last in zip([0, *starts], [*starts, length], strict=True)] if starts else []
    )


def positions(seq_idx: Tensor, begin: int = 0, document_start: Tensor | None = None) -> Tensor:
    """How many tokens each token has before it in its row, of its own document: [b, l] int64.

    Args:
        seq_idx: [b, l] number of each token's document, as the network gets it: all 0 where documents are not masked,
            so that these are positions in the row.
        begin: the tokens are the row's from this position on;
        document_start: [b] then the position at which the first one's document begins. None: where the tokens begin.
    """
    at = torch.arange(begin, begin + seq_idx.shape[1], device=seq_idx.device).expand(seq_idx.shape)
    first = torch.zeros_like(seq_idx, dtype=torch.bool)
    first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    start = torch.full_like(at[:, 0], begin) if document_start is None else document_start
    return at - torch.where(first, at, start[:, None]).cummax(1).values


def split_by_position(at: Tensor, length: int) -> list[Tensor]:
    """The tokens of each part, [n_i] indices into all b * l flattened; one part with all where there are no borders.

    Args:
        at: [b, l] from `positions`, in rows of `length` tokens.
    """
    starts = torch.tensor(borders(length), device=at.device, dtype=torch.int64)
    part = torch.bucketize(at.flatten(), starts, right=True)
    return [(part == k).nonzero()[:, 0] for k in range(len(starts) + 1)]
