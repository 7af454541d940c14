"""Parts laid end to end into shards."""

import numpy as np

from data_prep.job import Job
from data_prep.shards import ShardWriter


def join_parts(job: Job, output: str, shard_tokens: int | None) -> list[dict]:
    """Writes the shards.

    Args:
        output: prefix; with `shard_tokens` the shards are `output-00000`, `output-00001`, ...
        shard_tokens: a shard is closed before the document that would take it beyond this many tokens.

    Returns:
        of each shard: prefix, documents, tokens.
    """
    shards: list[dict] = []
    shard = ShardWriter(output if shard_tokens is None else f"{output}-{0:05d}", job.dtype)
    for number in range(len(job.pieces)):
        lengths = np.fromfile(job.part(number) + ".len", "<i4")
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        begin = 0
        with open(job.part(number) + ".bin", "rb") as part:
            while begin < len(lengths):
                end = len(lengths)
                if shard_tokens is not None:
                    room = shard_tokens - shard.tokens + int(ends[begin])
                    end = int(np.searchsorted(ends, room, "right")) - 1
                    if end <= begin and not shard.documents:
                        end = begin + 1  # a single document longer than a shard
                shard.take(part, int(ends[begin]), lengths[begin:end])
                begin = max(begin, end)
                if begin < len(lengths):
                    shards.append(shard.finish())
                    shard = ShardWriter(f"{output}-{len(shards):05d}", job.dtype)
    return [*shards, shard.finish()]
