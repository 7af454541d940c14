"""Pieces of rows, as the ranks of context parallelism read them, against the whole rows."""

import tracemalloc
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.data.indexed import IndexedReader, IndexedWriter
from megatron_taipan.data.loader import build_dataset, make_loader
from megatron_taipan.data.piece import RowPiece
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError


def write(prefix, lengths, base=1, dtype=np.uint16, mask=None):
    """Documents of distinct rising ids; `mask`, a generator, gives them a random loss mask."""
    ends = np.cumsum([base, *lengths])
    with IndexedWriter(prefix, dtype) as writer:
        for begin, end in zip(ends, ends[1:], strict=False):
            writer.add_document(np.arange(begin, end))
    if mask is not None:
        with IndexedWriter(f"{prefix}_loss_mask", np.uint8) as writer:
            for length in lengths:
                writer.add_document(mask.integers(0, 2, length))
    return str(prefix)


def datasets(size, train, split="train", **options):
    """The whole rows, and each of `size` pieces."""
    data = DataConfig(train=train, **{"valid_fraction": 0, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # documents longer than a row lose some of their marked tokens
        whole = build_dataset(data, split, 70_000)
        return whole, [build_dataset(data, split, 70_000, RowPiece(rank, size)) for rank in range(size)]


def compare(whole, pieces, indices):
    """Pieces put together are the whole rows, and what goes on in a piece began where the whole row says."""
    row, parts = whole.batch(indices), [piece.batch(indices) for piece in pieces]
    length = whole.seq_len // len(pieces)
    for name in ("tokens", "labels", "loss_mask"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1), row[name]), name
    for rank, part in enumerate(parts):
        assert set(part) - set(row) == {"document_start"}
        assert all(part[name].dtype == row[name].dtype for name in row)
        assert torch.equal(part["sample"], row["sample"])
        number = row["seq_idx"][:, rank * length, None]
        assert torch.equal(part["seq_idx"], row["seq_idx"][:, rank * length : (rank + 1) * length] - number)
        assert part["document_start"].dtype == torch.int64
        assert torch.equal(part["document_start"], (row["seq_idx"] < number).sum(1))
    return row


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([2, 4, 8]),
    length=st.integers(1, 7),
    split=st.sampled_from(["train", "valid"]),
    one_document=st.booleans(),
    mask_documents=st.booleans(),
    masked=st.tuples(st.booleans(), st.booleans()),
)
def test_pieces_are_cut_out_of_the_whole_rows(
    tmp_path_factory, seed, size, length, split, one_document, mask_documents, masked
):
    """A blend of two types, many documents of 0 and 1 tokens and some longer than a row, half of them held out."""
    folder, rng, seq_len = tmp_path_factory.mktemp("c"), np.random.default_rng(seed), size * length
    train = []
    for name, base, dtype, has_mask in zip("ab", (1, 30_000), (np.uint16, np.int32), masked, strict=True):
        short, long = rng.integers(0, rng.integers(2, 12), 60), rng.integers(seq_len + 1, 3 * seq_len + 2, 60)
        lengths = np.where(rng.random(60) < 0.4, long, short).tolist()
        mask = rng if has_mask and not one_document else None
        train.append({"prefix": write(folder / name, lengths, base, dtype, mask), "weight": 2 if mask else 1})
    whole, pieces = datasets(
        size,
        train,
        split,
        seq_len=seq_len,
        one_document=one_document,
        mask_documents=mask_documents,
        valid_fraction=0.5,
    )
    assert {piece.fingerprint for piece in pieces} == {whole.fingerprint}
    start = int(rng.integers(0, 10 * len(whole)))
    for indices in (range(3), range(start, start + 30), range(start + 30, start + 60), [start, 5, 10**6]):
        compare(whole, pieces, list(indices))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_documents_about_every_border(tmp_path, size, shards):
    """One token before a border, on it and one after; of one token; from before the row; round the ring's end."""
    lengths = [1, 0, 5, 1, 1, 16, 2, 40, 3, 0, 1, 7, 1] * 8
    rng, each = np.random.default_rng(0), -(-len(lengths) // shards)
    for number in range(shards):
        part = lengths[number * each : (number + 1) * each]
        write(tmp_path / f"x-{number:05d}", part, 1 + sum(lengths[: number * each]), mask=rng)
    whole, pieces = datasets(size, str(tmp_path / "x"), seq_len=16)
    everything = list(range(4 * len(whole)))
    row = compare(whole, pieces, everything)
    begins = torch.diff(row["seq_idx"], prepend=row["seq_idx"][:, :1]) > 0
    for border in range(16 // size, 16, 16 // size):
        assert begins[:, border - 1 : border + 2].any(0).all()
        assert (begins[:, border - 1] & begins[:, border]).any()  # a document of one token ends at the border
        assert (row["seq_idx"][:, border] == 0).any()
    assert sum(span.runs is not None for span in whole._locate(everything)) > 1
    assert row["loss_mask"].any()


def test_a_later_stage_goes_on_in_pieces(tmp_path):
    train = [write(tmp_path / "a", [9] * 40), write(tmp_path / "b", [7] * 40, 1000)]
    whole, pieces = datasets(4, train, seq_len=8)
    other, _ = datasets(2, train[:1], seq_len=8)
    for data in (whole, *pieces):
        data.go_on(11, other.read_after(11))
    assert pieces[3].read_after(30) == whole.read_after(30) and pieces[3].epochs(30) == whole.epochs(30)
    compare(whole, pieces, list(range(11, 40)))


def test_a_piece_comes_through_a_worker(tmp_path):
    _, pieces = datasets(2, write(tmp_path / "x", [9] * 40), seq_len=8)
    options = {"start": 3, "global_batch": 4, "micro_batch": 2, "dp_rank": 1, "dp_size": 2}
    for piece in pieces:
        plain, forked = (make_loader(piece, workers=w, **options) for w in (0, 1))
        for _ in range(3):
            a, b = next(plain), next(forked)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_piece_of_a_long_row_costs_its_tokens(tmp_path, monkeypatch):
    """Ids read, bytes of the batch, and all memory that reading one takes."""
    seq_len, size, read = 1 << 20, 8, Counter()
    read_raw = IndexedReader.read_raw

    def count(reader, start, out):
        read[reader.prefix] += len(out)
        read_raw(reader, start, out)

    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        for extra in (5, 1):
            writer.add_document(np.arange(seq_len + extra) % 60_000)
    whole, pieces = datasets(size, str(tmp_path / "x"), seq_len=seq_len, one_document=True)
    monkeypatch.setattr(IndexedReader, "read_raw", count)
    for index in range(2):
        row = whole.batch([index])["tokens"]
        read.clear()
        tracemalloc.start()
        part = pieces[5].batch([index])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert read == {whole.sources[0].stream.reader.prefix: 2 * 131_073}
        assert part["document_start"].data_ptr() - part["tokens"].data_ptr() == 24 * 131_072 + 8  # the batch's last
        assert peak < 28 * 131_072
        assert torch.equal(part["tokens"], row[:, 5 * 131_072 : 6 * 131_072]) and part["document_start"].tolist() == [0]


def test_a_loss_mask_is_read_in_pieces_too(tmp_path, monkeypatch):
    prefix, read = write(tmp_path / "x", [11] * 100, mask=np.random.default_rng(0)), Counter()
    _, pieces = datasets(4, prefix, seq_len=64)
    at = next(k for k in range(9) if pieces[1]._locate([k])[0].runs is None)
    read_raw = IndexedReader.read_raw

    def count(reader, start, out):
        read[reader.prefix] += len(out)
        read_raw(reader, start, out)

    monkeypatch.setattr(IndexedReader, "read_raw", count)
    pieces[1].batch([at])
    assert read == {prefix: 2 * 17, prefix + "_loss_mask": 17}


def test_an_id_beyond_the_vocabulary_is_met_by_the_pieces_that_hold_it(tmp_path):
    whole, pieces = datasets(4, write(tmp_path / "x", [10] * 20), seq_len=16)
    stored = np.fromfile(tmp_path / "x.bin", "<u2")
    stored[77] = 65_000
    stored.tofile(tmp_path / "x.bin")
    for data in (whole, *pieces):
        data.vocab_size = 60_000

    def refusal(data, index):
        try:
            data.batch([index])
        except UserError as error:
            return str(error)
        return None

    for index in range(len(whole)):
        assert {refusal(piece, index) for piece in pieces} - {None} == {refusal(whole, index)} - {None}


def test_pieces_that_there_are_not(tmp_path):
    prefix = write(tmp_path / "x", [50])
    with pytest.raises(UserError, match=r"seq_len=10 .*context=4 .*remainder 2.; set data.seq_len to 8 or 12, or"):
        datasets(4, prefix, seq_len=10)
    with pytest.raises(UserError, match="set data.seq_len to 4, or"):
        datasets(4, prefix, seq_len=3)
    for rank, size in ((4, 4), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"no piece {rank} of {size}"):
            RowPiece(rank, size)
