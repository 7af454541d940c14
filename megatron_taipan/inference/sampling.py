"""Choosing the next token from logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_taipan.errors import UserError

LEAST_TEMPERATURE = 1e-30  # lower ones give infinite logits in float32, and choose no other token than this one


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy: always the most likely token."""

    temperature: float = 0.0  # divides the logits; 0 is greedy
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens whose probability reaches p (nucleus, arXiv 1904.09751)
    repetition_penalty: float = 1.0  # > 1 makes tokens that occurred less likely (arXiv 1909.05858, section 4.1)
    seed: int = 0  # of the draws; row i of a batch draws from (seed, i), whatever the other rows do

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be 0 (greedy) or above, and finite")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be above 0, and finite")


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """The next token of each row.

    Args:
        logits: [b, v] of the position before the new token.
        seen: [b, v] bool, the tokens that occurred in each row.
        generators: one CPU generator a row, advanced by one draw where the choice is random.

    Returns:
        [b] int64.
    """
    logits = penalize(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / max(sampling.temperature, LEAST_TEMPERATURE)
    logits = keep_top_p(keep_top_k(logits, sampling.top_k), sampling.top_p)
    # Drawn on the CPU, so that a seed gives the same text on every device.
    draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    cumulative = logits.double().softmax(-1).cumsum(-1)  # [b, v]
    draws = draws.to(logits.device)[:, None] * cumulative[:, -1:]
    # right=True: the first token whose cumulative probability exceeds the draw, so never one of probability zero
    return torch.searchsorted(cumulative, draws, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of seen tokens by `penalty`."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest logits of each row become -inf; ties with the k-th stay."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, -1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the shortest run of most likely tokens whose probability reaches p; the first always stays."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability  # what the more likely tokens hold together
    drop = (before >= p) & (before > 0)  # a p below float32's least number is 0 there
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
