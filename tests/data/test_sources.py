"""Which pairs a name means, and in which order: that of their numbers, not of their letters."""

import numpy as np
import pytest

from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.data.sources import find_pairs, open_reader


def write(path, documents) -> None:
    with IndexedWriter(path, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)


@pytest.mark.parametrize("given", ["part_*", "part_*.idx"])
def test_a_glob_has_its_pairs_in_the_order_of_their_numbers(tmp_path, given):
    numbers = [1, 2, 9, 10, 11, 100]
    for number in reversed(numbers):
        write(tmp_path / f"part_{number}", [[number, number]])
        write(tmp_path / f"part_{number}_loss_mask", [[0, 1]])
    assert find_pairs(str(tmp_path / given)) == [str(tmp_path / f"part_{number}") for number in numbers]
    reader = open_reader(str(tmp_path / given))
    assert [reader.document(k).tolist() for k in range(reader.n_documents)] == [[n, n] for n in numbers]


def test_shards_of_six_digits_follow_those_of_five(tmp_path):
    """As `--shard-tokens` names them."""
    for number in (99_998, 99_999, 100_000, 100_001):
        write(tmp_path / f"x-{number:05d}", [[1]])
    found = find_pairs(str(tmp_path / "x-*"))
    assert [name.rpartition("-")[2] for name in found] == ["99998", "99999", "100000", "100001"]
