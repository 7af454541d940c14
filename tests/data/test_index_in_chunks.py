"""An index is handled in chunks of half a million entries; here in tiny ones, against bytes written by hand."""

import struct

import numpy as np
import pytest

from megatron_taipan.data import indexed
from megatron_taipan.data.indexed import IndexedReader, IndexedWriter
from megatron_taipan.errors import UserError

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6], [7]]


def index(lengths, offsets, first) -> bytes:
    """Of uint16 tokens."""
    counts = len(lengths), len(offsets), len(first)
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(first))
    return head + struct.pack(f"<{counts[0]}i{counts[1]}q{counts[2]}q", *lengths, *offsets, *first)


WHOLE = index([3, 0, 1, 2, 1], [0, 6, 6, 8, 12], range(6))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6])
def test_any_chunk_gives_the_same_index_and_documents(tmp_path, monkeypatch, chunk):
    with IndexedWriter(tmp_path / "one", np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    fingerprint = IndexedReader(tmp_path / "one").fingerprint
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    with IndexedWriter(tmp_path / "many", np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    assert (tmp_path / "one.idx").read_bytes() == (tmp_path / "many.idx").read_bytes() == WHOLE
    reader = IndexedReader(tmp_path / "many")
    assert [reader.document(i).tolist() for i in range(5)] == DOCUMENTS
    assert np.concatenate([*reader.lengths()]).tolist() == [3, 0, 1, 2, 1]
    assert reader.fingerprint == fingerprint


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (index([3, 0, 1, 2, 1], [0, 6, 4, 8, 12], range(6)), "sequence 2 starts at byte 4, and the one before ends at"),
        (index([3, 0, 1, 2, 1], [0, 6, 6, 10, 12], range(6)), "sequence 3 starts at byte 10, .* ends at byte 8"),
        (index([3, 0, 1, 2, 1], [0, 6, 6, 8, 12], [0, 1, 3, 2, 4, 5]), "not in rising order"),
        (index([3, 0, 1, 2, 1], [0, 6, 6, 8, 12], [0, 2, 1, 3, 4, 5]), "not in rising order"),
        (index([3, 0, 1, 2, 1], [0, 6, 6, 8, 12], [0, 1, 2, 3, 5, 4]), "not in rising order"),
        (index([3, 0, 1, 2, 1], [0, 6, 6, 8, 12], [0, 1, 2, 3, 4]), "documents end at sequence 4 of 5"),
        (index([3, 0, 1, 2, 2], [0, 6, 6, 8, 12], range(6)), "has 14 bytes and its index describes 16"),
        (index([3, 0, 1, -2, 1], [0, 6, 6, 8, 4], range(6)), "sequence 3 has -2 tokens"),
    ],
)
def test_a_fault_on_either_side_of_a_border_is_found(tmp_path, monkeypatch, chunk, idx, message):
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    (tmp_path / "x.idx").write_bytes(idx)
    np.arange(1, 8, dtype="<u2").tofile(tmp_path / "x.bin")
    with pytest.raises(UserError, match=message):
        IndexedReader(tmp_path / "x")
