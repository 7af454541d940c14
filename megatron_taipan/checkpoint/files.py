"""Durable files: small texts, old or new as a whole; safetensors in one go, hashed on the way, or tensor by tensor.

The format is huggingface/safetensors': 8 bytes little-endian length of the header, a JSON header with type, shape and
offsets of every tensor, the raw bytes. The library's own writer takes all tensors at once and has no hash.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
    torch.uint8: "U8",
}  # fmt: skip
TEMPORARY = ".tmp"  # of names under which something is still being written
Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type by name, in the order of the file


def write_text(path: Path, text: str) -> None:
    """Writes a small file so that either the old or the whole new content is there."""
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Makes names in a folder (new, renamed) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_and_sha256(path: Path, *, flush: bool) -> tuple[int, str]:
    """Size and SHA-256 of a file; with `flush` its content is on the disk afterwards."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
        if flush:
            os.fsync(file.fileno())
    return size, digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Writes tensors (on the CPU, contiguous) to a new file, durable at return; returns its size in bytes and SHA-256.

    Python's lock is free while bytes are hashed and written, so a thread that calls this hardly slows the others.
    """
    start, _ = header({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for view in (memoryview(start), *map(raw_bytes, tensors.values())):
            while len(view):  # an unbuffered write may take less than it is given
                written = file.write(view[: 1 << 24])
                digest.update(view[:written])
                size += written
                view = view[written:]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


class TensorFile:
    """A new file whose tensors are given one by one, in any order; what is never given stays zero.

    Args:
        specs: every tensor of the file.
    """

    def __init__(self, path: Path, specs: Specs):
        start, self.places = header(specs)
        self.path, self.specs, self.begin = path, specs, len(start)
        with open(path, "xb") as file:
            file.write(start)
            file.truncate(self.begin + max((end for _, end in self.places.values()), default=0))

    def put(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, converted to its type in the file.

        Raises:
            ValueError: it has another shape than was announced.
        """
        shape, dtype = self.specs[name]
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
        view, at = raw_bytes(tensor.detach().to("cpu", dtype).contiguous()), self.begin + self.places[name][0]
        with open(self.path, "r+b", buffering=0) as file:  # not kept open: there may be a file for every process
            file.seek(at)
            while len(view):
                view = view[file.write(view[: 1 << 26]) :]

    def finish(self) -> None:
        """Makes the content durable."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())


def header(specs: Specs) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes before the tensors, and where each tensor begins and ends after them."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name, (shape, dtype) in specs.items():
        begin, end = end, end + n_bytes(shape, dtype)
        places[name] = (begin, end)
        entries[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data at an 8-byte boundary
    return len(text).to_bytes(8, "little") + text, places


def n_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer
