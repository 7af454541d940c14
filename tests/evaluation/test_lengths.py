"""Lengths of a command line."""

import pytest

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.lengths import length_name, parse_lengths


def test_lengths_are_1024_based_and_ascend():
    assert parse_lengths("2k, 512,1M,1000") == [512, 1000, 2048, 1048576]
    assert parse_lengths("1K,4K,...,1M") == [1 << k for k in (10, 12, 14, 16, 18, 20)]
    assert parse_lengths("1K,2K,...,5K") == [1024, 2048, 4096, 5120]


@pytest.mark.parametrize("words", ["", "1G", "0", "-1", "1K,...,4K", "1K,2K,...", "4K,2K,...,8K", "1.5K", "1K,,2K"])
def test_what_is_no_length_is_refused(words):
    with pytest.raises(UserError, match="write 512|stands after"):
        parse_lengths(words)


def test_names_are_what_is_parsed():
    assert [length_name(n) for n in (512, 1000, 1024, 1536, 3 << 20)] == ["512", "1000", "1K", "1536", "3M"]
