"""What fuzzers call with bytes of their own: it comes back, or raises the user's error; anything else is a finding."""

import os
from pathlib import Path

import numpy as np
import pytest

from data_prep import long_text, readers
from data_prep.extract import field_extractor
from data_prep.inputs import Slice
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError


def index(folder: Path, data: bytes) -> None:
    """The first two bytes say how long the .bin is, the others are the .idx: refused, or consistent with itself."""
    size, idx = int.from_bytes(data[:2], "little"), data[2:]
    (folder / "x.idx").write_bytes(idx)
    (folder / "x.bin").write_bytes(bytes(size))
    try:
        reader = IndexedReader(folder / "x")
    except UserError:
        return
    lengths = [len(reader.document(i)) for i in range(reader.n_documents)]
    assert sum(lengths) == reader.n_tokens and reader.n_tokens * reader.dtype.itemsize == size
    begins, _ = reader.boundaries(np.array([0]), np.array([reader.n_tokens]))
    assert sorted(set(begins.tolist())) == begins.tolist() and all(0 <= at < reader.n_tokens for at in begins)


def lines(folder: Path, data: bytes) -> None:
    """The first byte says the size of blocks, the others are JSON lines: both ways of reading them agree, and every
    line that is not blank gives one record."""
    block, raw = data[:1][0] + 1 if data else 1, data[1:]
    path = folder / "x.jsonl"
    path.write_bytes(raw)
    whole = _records(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "LONG", 16)
        patch.setattr(long_text, "LONG_STRING", 8)
        patch.setattr(long_text, "BLOCK", block)
        chunks = _records(path)
    assert whole == chunks
    without_mark = raw.removeprefix(b"\xef\xbb\xbf")
    assert len(whole) == sum(not line.isspace() for line in without_mark.split(b"\n") if line)


def _records(path: Path) -> list[str | None]:
    """The text of each record, None for those without."""
    found: list[str | None] = []
    for record in readers.read(Slice(str(path), 0, os.path.getsize(path)), field_extractor("text")):
        text = "".join(record.chunks) if record.chunks is not None else record.text
        found.append(text or None)
        assert bool(text) != bool(record.problem)
    return found
