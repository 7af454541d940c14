"""Writing safetensors files one tensor at a time, sharded with an index when large."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_taipan.checkpoint.files import Specs, TensorFile, n_bytes


def write_sharded(
    folder: Path,
    tensors: Specs,
    load: Callable[[str], Tensor],
    max_shard_bytes: float = 5e9,
) -> list[Path]:
    """Writes model.safetensors, or numbered shards and model.safetensors.index.json.

    Args:
        tensors: name to (shape, dtype), in the order in which they are written.
        load: gives one tensor by name, asked for once each.

    Returns:
        The files with weights.
    """
    shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    used = 0
    for name, (shape, dtype) in tensors.items():
        size = n_bytes(shape, dtype)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = (shape, dtype)
        used += size
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        file = TensorFile(folder / name, shard)
        for tensor in shard:
            file.put(tensor, load(tensor))
        file.finish()
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(n_bytes(*spec) for spec in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]
