"""The fuzz targets on mutated seeds, for a moment; tests/fuzz/run.py goes on for hours."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import targets


def pair(lengths: list[int], first: list[int], code: int = 8) -> bytes:
    """A valid pair in the form that the target takes."""
    offsets = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    idx = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(first))
    idx += struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(first)}q", *lengths, *offsets, *first)
    return (2 * sum(lengths)).to_bytes(2, "little") + idx


SEEDS = {
    "index": [pair([3, 0, 5], [0, 1, 2, 3]), pair([1, 1, 1, 1], [0, 0, 3, 4]), pair([], [0]), pair([9], [0, 1])],
    "lines": [
        bytes([size]) + b"\n".join(json.dumps(record, ensure_ascii=size > 3).encode() for record in records)
        for size in (0, 3, 9)
        for records in (
            [{"text": 'a "quoted" \\ word \u00e9 \U0001f600', "n": [1, None, {"x": "y" * 30}]}, {"text": "b"}],
            [{"text": "long " * 20}, {"other": "x"}, [], "text", {"text": ""}],
        )
    ],
}


@pytest.mark.parametrize("name", list(SEEDS))
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_seeds(tmp_path_factory, name, data):
    raw = bytearray(data.draw(st.sampled_from(SEEDS[name])))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\\", b'"', b"\n", b"\\u", b"\xff" * 8, bytes(8)]))
        )
    getattr(targets, name)(tmp_path_factory.mktemp("fuzz"), bytes(raw))
