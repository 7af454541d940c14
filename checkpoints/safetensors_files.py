"""Writing safetensors files one tensor at a time, sharded with an index when large.

The format is huggingface/safetensors': 8 bytes little endian header length, a JSON header with dtype, shape and
offsets of each tensor, then the raw bytes. Only one tensor is in memory at a time.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_sharded(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    load: Callable[[str], Tensor],
    max_shard_bytes: int = 5_000_000_000,
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
        size = _n_bytes(shape, dtype)
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
        _write_file(folder / name, shard, load)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_n_bytes(*spec) for spec in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def _write_file(path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], load: Callable) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + _n_bytes(shape, dtype)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data at an 8-byte boundary
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in tensors.items():
            tensor = load(name)
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
            raw = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
            file.write(memoryview(raw.numpy()))
        file.flush()
        os.fsync(file.fileno())


def _n_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
