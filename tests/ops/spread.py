"""Ranks that share a group of the gated norm, played one after the other in one process."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.ops.kernel_checks import with_gradients


def over_ranks(run: Callable, inputs: list[Tensor], ranks: int) -> list[Tensor]:
    """The ranks' outputs run(rank, inputs, reduce_sum) side by side, then the gradients of the inputs, added up.

    reduce_sum stands for the collective that adds up over the ranks, of which `run` needs one forward and one backward.
    Everything is computed three times: the n-th time knows the totals of n - 1 collectives, so that its parts of the
    n-th one are right, and the last time knows all.
    """
    totals: list[Tensor] = []
    for _ in range(3):
        rank_sums = [Recorder(totals) for _ in range(ranks)]

        def whole(*t: Tensor, sums=rank_sums) -> Tensor:
            return torch.cat([run(rank, t, sums[rank]) for rank in range(ranks)], -1)

        results = with_gradients(whole, inputs)
        assert all(len(s.parts) == 2 for s in rank_sums), [len(s.parts) for s in rank_sums]
        if len(totals) < 2:
            totals.append(sum(s.parts[len(totals)] for s in rank_sums))
    return results


class Recorder:
    """A reduce_sum that keeps its rank's parts and gives the totals that are known."""

    def __init__(self, totals: list[Tensor]):
        self.parts: list[Tensor] = []
        self.totals = list(totals)

    def __call__(self, part: Tensor) -> Tensor:
        self.parts.append(part)
        return (self.totals + [part] * 2)[len(self.parts) - 1]


def take_heads(inputs: list[Tensor], rank: int, ranks: int, headdim: int, d_state: int) -> list[Tensor]:
    """The arguments of `mamba2_mix` with one group, cut to one rank's heads; B and C are every rank's.

    Args:
        inputs: zxbcdt [b, l, ...], conv_weight [channels, width], conv_bias, dt_bias, A, D [heads], norm_weight.
    """
    zxbcdt, conv_weight, conv_bias, *per_head, norm_weight = inputs
    heads = len(per_head[0])
    inner, own = heads * headdim, heads // ranks
    channels = slice(rank * own * headdim, (rank + 1) * own * headdim)
    z, x, BC, dt = zxbcdt.split([inner, inner, 2 * d_state, heads], -1)
    mine = slice(rank * own, (rank + 1) * own)
    return [
        torch.cat([z[..., channels], x[..., channels], BC, dt[..., mine]], -1),
        *(torch.cat([t[channels], t[inner:]]) for t in (conv_weight, conv_bias)),
        *(t[mine] for t in per_head), norm_weight[channels],
    ]  # fmt: skip


def mix_over_ranks(inputs: list[Tensor], sizes: dict, ranks: int) -> list[Tensor]:
    """`mamba2_mix` with one group, its heads over that many ranks: output and gradients.

    Args:
        inputs: as for `take_heads`.
        sizes: seq_idx, headdim, groups, d_state.
    """
    from megatron_taipan.ops.mamba2_triton import mamba2_mix

    def run(rank: int, t: tuple[Tensor, ...], reduce_sum: Callable) -> Tensor:
        part = take_heads(list(t), rank, ranks, sizes["headdim"], sizes["d_state"])
        return mamba2_mix(*part, **sizes, group_size=len(inputs[-1]), eps=1e-5, reduce_sum=reduce_sum)

    return over_ranks(run, inputs, ranks)


def gated_norm_over_ranks(inputs: list[Tensor], ranks: int) -> list[Tensor]:
    """The gated norm's kernels on y, z [..., d], weight [d], one group of channels over that many ranks."""
    from megatron_taipan.ops.gated_norm_triton import gated_rms_norm

    d = inputs[-1].shape[0]

    def run(rank: int, t: tuple[Tensor, ...], reduce_sum: Callable) -> Tensor:
        own = slice(rank * d // ranks, (rank + 1) * d // ranks)
        return gated_rms_norm(*(part[..., own] for part in t), eps=1e-5, group_size=d, reduce_sum=reduce_sum)

    return over_ranks(run, inputs, ranks)
