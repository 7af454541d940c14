"""How much of a blend each source is, and how a log describes it."""

import warnings
from collections.abc import Sequence

from megatron_taipan.data.blend import MAX_PERIOD, misweighted
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.samples import Samples
from megatron_taipan.data.shards import Shards
from megatron_taipan.data_config import DataSource

SHOWN = 12  # sources that are described one by one


def choose_weights(chosen: list[DataSource], sources: Sequence[Samples]) -> list[float]:
    """The weight of each source; warns of one whose share differs from its weight by a tenth or more.

    With `weight: tokens` it is the number of samples in an epoch, so that all sources are read equally often.
    """
    by_tokens = chosen[0].weight == "tokens"
    weights = [float(s.per_epoch if by_tokens else c.weight) for c, s in zip(chosen, sources, strict=True)]
    for k, share, gets in misweighted(weights):
        warnings.warn(
            f"{chosen[k].prefix} with weight {weights[k]:g} is {float(share):.3g} of the blend, and its share becomes"
            f" {float(gets):.3g}, since shares go in steps of 1/{MAX_PERIOD}: it is drawn {float(gets / share):.4g}"
            " times as often as the weight says; change the weight, or leave it out",
            stacklevel=3,
        )
    return weights


def describe_blend(chosen: list[DataSource], sources: Sequence[Samples], drawn: list[int]) -> str:
    """How the sources of training data are weighted, and the share and the epochs of each.

    Args:
        drawn: samples that the run takes from each.
    """
    if len(sources) == 1:
        return f"{_name(sources[0].stream.reader)}, {drawn[0] / sources[0].per_epoch:.2f} epochs"
    if chosen[0].weight == "tokens":
        how = "by their tokens (weight: tokens), so all are read equally often"
    elif any("weight" in source.model_fields_set for source in chosen):
        how = "by the weights given"
    else:
        how = "with equal weights, since none is given (weight: tokens weights them by size)"
    each = [
        f"{_name(s.stream.reader)} {100 * n / sum(drawn):.4g} %, {n / s.per_epoch:.2f} epochs"
        for s, n in zip(sources[:SHOWN], drawn, strict=False)
    ]
    more = f"; and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
    return f"{len(sources)} sources {how}: {'; '.join(each)}{more}"


def _name(reader: IndexedReader) -> str:
    return reader.prefix + (f" ({len(reader.pairs)} shards)" if isinstance(reader, Shards) else "")
