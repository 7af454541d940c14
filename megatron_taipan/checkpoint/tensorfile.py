"""Writing a safetensors file that is hashed on its way and durable when the call returns.

The format is huggingface/safetensors': 8 bytes little-endian length of the header, a JSON header with type, shape and
offsets of every tensor, the raw bytes. The library's own writer would need a second reading for the hash.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32"}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Writes tensors (on the CPU, contiguous) to a new file; returns its size in bytes and SHA-256.

    Python's lock is free while bytes are hashed and written, so a thread that calls this hardly slows the others.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data at an 8-byte boundary
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        start = memoryview(len(text).to_bytes(8, "little") + text)
        for view in (start, *map(raw_bytes, tensors.values())):
            while len(view):  # an unbuffered write may take less than it is given
                written = file.write(view[: 1 << 24])
                digest.update(view[:written])
                size += written
                view = view[written:]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer
