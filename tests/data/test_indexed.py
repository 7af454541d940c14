"""The .bin/.idx format: against Megatron's own package, and against damaged files."""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.data.indexed import DTYPES, IndexedReader, IndexedWriter, token_dtype
from megatron_taipan.errors import UserError

documents_strategy = st.lists(st.lists(st.integers(0, 65_499), max_size=12), min_size=1, max_size=20)


def write(prefix, documents, dtype=np.uint16):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


@settings(max_examples=60, deadline=None)
@given(documents=documents_strategy, wide=st.booleans())
def test_megatron_reads_and_writes_the_same_bytes(tmp_path_factory, documents, wide):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    folder, dtype = tmp_path_factory.mktemp("pair"), np.int32 if wide else np.uint16
    ours = write(folder / "ours", documents, dtype)
    builder = indexed.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype), [len(document)])
    builder.finalize(str(folder / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (folder / f"ours{ending}").read_bytes() == (folder / f"theirs{ending}").read_bytes()
    if any(documents):  # their reader cannot map an empty .bin
        theirs = indexed.IndexedDataset(ours)
        assert [theirs[i].tolist() for i in range(len(theirs))] == documents
        assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    reader = IndexedReader(folder / "theirs")
    assert [reader.document(i).tolist() for i in range(reader.n_documents)] == documents


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), max_size=3), min_size=1))
def test_documents_of_several_sequences(tmp_path_factory, documents):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    prefix = str(tmp_path_factory.mktemp("pair") / "x")
    builder = indexed.IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    for sequences in documents:
        builder.add_document(np.concatenate([[], *sequences]).astype(np.int32), [len(s) for s in sequences])
    builder.finalize(prefix + ".idx")
    reader = IndexedReader(prefix)
    flat = [sum(sequences, []) for sequences in documents]
    assert [reader.document(i).tolist() for i in range(reader.n_documents)] == flat
    starts = np.concatenate([[0], np.cumsum([len(d) for d in flat])])
    assert reader.starts(np.arange(len(flat) + 1)).tolist() == starts.tolist()
    inner = sorted({s for s in starts.tolist() if 0 < s < reader.n_tokens})
    assert inner_starts(reader, 0, reader.n_tokens) == inner
    for position in range(reader.n_tokens):
        document = reader.find(position)
        assert starts[document] <= position < starts[document + 1]


def inner_starts(reader, a, b):
    return reader.boundaries(np.array([a + 1]), np.array([b]))[0].tolist()


@settings(max_examples=60, deadline=None)
@given(documents=documents_strategy, data=st.data())
def test_boundaries(tmp_path_factory, documents, data):
    reader = IndexedReader(write(tmp_path_factory.mktemp("pair") / "x", documents))
    drawn = data.draw(st.lists(st.tuples(*[st.integers(0, reader.n_tokens)] * 2), min_size=1, max_size=4))
    starts = np.cumsum([0, *map(len, documents)])[:-1].tolist()
    found, span = reader.boundaries(*np.array([sorted(ends) for ends in drawn]).T)
    for k, ends in enumerate(drawn):
        a, b = sorted(ends)
        assert found[span == k].tolist() == sorted({s for s in starts if a <= s < b})
    assert (np.diff(span) >= 0).all()


def test_the_vocabulary_chooses_the_type():
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32


def test_an_id_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="65536 does not fit uint16"):
        write(tmp_path / "x", [[1], [65_536]])
    with pytest.raises(UserError, match="-1 does not fit int32"):
        write(tmp_path / "y", [[-1]], np.int32)
    assert not os.listdir(tmp_path)


def test_nothing_has_its_final_name_before_the_end(tmp_path):
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    writer.add_document([1, 2])
    assert not (tmp_path / "x.bin").exists() and not (tmp_path / "x.idx").exists()
    writer.finish()
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"]


def test_fingerprint_follows_content(tmp_path):
    def fingerprint(name, documents, dtype=np.uint16):
        return IndexedReader(write(tmp_path / name, documents, dtype)).fingerprint

    base = fingerprint("a", [[1, 2], [3]])
    assert fingerprint("b", [[1, 2], [3]]) == base
    others = [[[1], [2, 3]], [[1, 2], [4]], [[1, 2], [3], []], [[1, 2]]]
    assert len({base, *(fingerprint(f"c{i}", d) for i, d in enumerate(others))}) == 5
    assert fingerprint("d", [[1, 2], [3]], np.int32) != base


def header(sequences, documents, magic=b"MMIDIDX\0\0", version=1, code=8):
    return struct.pack("<9sQBQQ", magic, version, code, sequences, documents)


@pytest.mark.parametrize(
    ("idx", "bin", "message"),
    [
        (b"", b"", "0 bytes"),
        (header(0, 1)[:20], b"", "20 bytes"),
        (b"PK\3\4" + bytes(60), b"", "not a token index"),
        (header(0, 1, version=2) + bytes(8), b"", "version 2"),
        (header(0, 1, code=99) + bytes(8), b"", "type code 99"),
        (header(0, 1, code=7) + bytes(8), b"", "type code 7"),
        (header(2**60, 2**60) + bytes(100), b"", f"claims {2**60} sequences"),
        (header(0, 0), b"", "-1 documents"),
        (header(1, 2) + struct.pack("<iqqq", 3, 0, 0, 1), b"ab", "2 bytes and its index describes 6"),
        (header(1, 2) + struct.pack("<iqqq", 3, 0, 0, 1)[:-1], b"abcdef", "truncated"),
        (header(1, 2) + struct.pack("<iqqq", -3, 0, 0, 1), b"abcdef", "-3 tokens"),
        (header(1, 2) + struct.pack("<iqqq", 3, 2**62, 0, 1), b"abcdef", f"starts at byte {2**62}"),
        (header(2, 3) + struct.pack("<2i2q3q", 1, 2, 0, 4, 0, 1, 2), b"abcdef", "starts at byte 4.*ends at byte 2"),
        (header(1, 2) + struct.pack("<iqqq", 3, 0, 0, 7), b"abcdef", "documents end at sequence 7 of 1"),
        (header(1, 2) + struct.pack("<iqqq", 3, 0, 1, 1), b"abcdef", "rising order"),
        (header(2, 3) + struct.pack("<2i2q3q", 1, 2, 0, 2, 0, 2, 1), b"abcdef", "rising order"),
    ],
)
def test_damaged_files_are_refused(tmp_path, idx, bin, message):
    (tmp_path / "x.idx").write_bytes(idx)
    (tmp_path / "x.bin").write_bytes(bin)
    with pytest.raises(UserError, match=message):
        IndexedReader(tmp_path / "x")


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"x\.idx does not exist"):
        IndexedReader(tmp_path / "x")
    write(tmp_path / "x", [[1]])
    (tmp_path / "x.bin").unlink()
    with pytest.raises(UserError, match=r"x\.bin does not exist"):
        IndexedReader(tmp_path / "x")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_fuzz_a_changed_index_is_refused_or_still_consistent(tmp_path_factory, data):
    prefix = tmp_path_factory.mktemp("fuzz") / "x"
    write(prefix, [[1, 2, 3], [], [4], [5, 6]])
    raw = bytearray((prefix.parent / "x.idx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    (prefix.parent / "x.idx").write_bytes(raw + data.draw(st.binary(max_size=9)))
    try:
        reader = IndexedReader(prefix)
    except UserError:
        return
    assert sum(len(reader.document(i)) for i in range(reader.n_documents)) == reader.n_tokens
    assert reader.n_tokens * reader.dtype.itemsize == os.path.getsize(f"{prefix}.bin")


def test_huge_claims_take_no_memory(tmp_path):
    """A header that claims 2^60 documents is refused in a process that may not allocate anything large."""
    (tmp_path / "x.idx").write_bytes(header(2**60, 2**60 + 1))
    (tmp_path / "x.bin").write_bytes(b"")
    code = f"""
from megatron_taipan.data.indexed import IndexedReader
import os, resource
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), size + (8 << 20)))
try:
    IndexedReader({str(tmp_path / "x")!r})
except Exception as error:
    print(type(error).__name__)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "UserError"


@pytest.mark.parametrize(("hard", "said"), [(400, "100"), (40, "UserError Too many open files; allow more")])
def test_a_corpus_of_more_shards_than_files_may_be_open(tmp_path, hard, said):
    """Each takes two; the limit that a system begins with is raised as far as it goes; what then fails is a line."""
    prefix = write(tmp_path / "x", [[1, 2, 3]])
    code = f"""
from megatron_taipan.data.indexed import IndexedReader
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, {hard}))
try:
    print(len([IndexedReader({prefix!r}) for _ in range(100)]))
except Exception as error:
    print(type(error).__name__, str(error).partition(": ")[2])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith(said)


def test_every_integer_type_reads_back(tmp_path):
    for dtype in DTYPES.values():
        if np.dtype(dtype).kind != "f":
            prefix = write(tmp_path / np.dtype(dtype).name, [[1, 2], [127]], dtype)
            assert IndexedReader(prefix).document(1).tolist() == [127]


def test_a_bin_that_shrinks_is_an_error_not_a_crash(tmp_path):
    reader = IndexedReader(write(tmp_path / "x", [list(range(1000))]))
    os.truncate(tmp_path / "x.bin", 100)
    with pytest.raises(UserError, match="became shorter"):
        reader.document(0)
