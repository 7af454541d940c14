"""Which layers a pipeline stage holds: the pattern's cuts, or an even spread of the cost."""

from collections.abc import Sequence

from megatron_taipan.errors import UserError


def stage_bounds(costs: Sequence[float], cuts: Sequence[int], stages: int) -> list[int]:
    """First layer of each stage, and the number of layers: stage s holds bounds[s] to bounds[s + 1] - 1.

    Args:
        costs: of each layer, in any unit; the first and last include what embedding and head cost.
        cuts: layer indices before which a stage starts, from the pattern; empty: the cost is balanced, so that the
            most expensive stage costs as little as possible.

    Raises:
        UserError: the cuts do not make that many stages, or there are fewer layers than stages.
    """
    n = len(costs)
    if cuts and len(cuts) + 1 != stages:
        raise UserError(
            f"model.pattern is cut in {len(cuts) + 1} stages by {len(cuts)} '|', but parallel.pipeline={stages};"
            " make them agree, or leave the cuts out to balance by operations"
        )
    if stages > n:
        raise UserError(f"parallel.pipeline={stages} needs at least {stages} layers; model.pattern has {n}")
    if cuts:
        return [0, *cuts, n]
    # best[k][i]: the highest cost of a stage when k stages hold the first i layers; start[k][i]: where the last begins.
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best = [[float("inf")] * (n + 1) for _ in range(stages + 1)]
    start = [[0] * (n + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for k in range(1, stages + 1):
        for i in range(k, n + 1):
            for j in range(k - 1, i):
                highest = max(best[k - 1][j], total[i] - total[j])
                if highest < best[k][i]:
                    best[k][i], start[k][i] = highest, j
    bounds = [n]
    for k in range(stages, 0, -1):
        bounds.append(start[k][bounds[-1]])
    return bounds[::-1]
