"""A pair is on the disk before it has its name, and a kill on the way leaves no index beside another's tokens."""

import numpy as np
import pytest

from data_prep.shards import ShardWriter
from megatron_taipan.data.indexed import IndexedReader, IndexedWriter
from megatron_taipan.data.loss_mask import find_mask
from megatron_taipan.errors import UserError
from tests.durable import killed_at, watched_renames

OLD, NEW = [[1, 2, 3, 4], [5, 6]], [[7, 8], [9, 10, 11, 12]]  # as many bytes: sizes alone do not tell them apart


def write(prefix, documents) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)


def write_masked(prefix, documents) -> None:
    """The way of `data_prep tokenize`; learned are the even ids."""
    folder, tokens = prefix.parent / "source", np.concatenate(documents).astype(np.uint16)
    folder.mkdir(exist_ok=True)
    tokens.tofile(folder / "bin")
    (tokens % 2 == 0).astype(np.uint8).tofile(folder / "mask")
    writer = ShardWriter(str(prefix), np.dtype(np.uint16), masked=True)
    with open(folder / "bin", "rb") as source, open(folder / "mask", "rb") as mask:
        writer.take(source, 0, np.array([len(document) for document in documents]), mask)
    writer.finish()


def documents_of(prefix) -> list[list[int]]:
    reader = IndexedReader(prefix)
    return [reader.document(i).tolist() for i in range(reader.n_documents)]


@pytest.mark.parametrize(
    ("way", "names"),
    [
        (write, ["x.bin", "x.idx"]),
        (write_masked, ["x_loss_mask.bin", "x_loss_mask.idx", "x.bin", "x.idx"]),
    ],
)
def test_what_gets_its_name_is_on_the_disk_the_index_last(tmp_path, monkeypatch, way, names):
    with watched_renames(monkeypatch) as seen:
        way(tmp_path / "x", NEW)
    assert seen.names == names and not seen.folders
    assert documents_of(tmp_path / "x") == NEW


@pytest.mark.parametrize("way", [write, write_masked])
def test_a_kill_between_two_names_leaves_one_pair_or_none(tmp_path, monkeypatch, way):
    found = []
    for number in range(1, 20):
        prefix = tmp_path / str(number) / "x"
        prefix.parent.mkdir()
        way(prefix, OLD)
        with killed_at(monkeypatch, number):
            way(prefix, NEW)
        try:
            whole = documents_of(prefix)
            assert whole in (OLD, NEW)
            if way is write_masked:
                mask = find_mask(IndexedReader(prefix))
                if mask is not None:
                    marks = [mask.document(i).tolist() for i in range(mask.n_documents)]
                    assert marks == [[int(token % 2 == 0) for token in document] for document in whole]
        except UserError as error:
            assert "does not exist" in str(error)
            whole = None
        found.append(whole)
    assert found[0] == OLD and found[-1] == NEW and None in found
