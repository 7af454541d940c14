"""A tiktoken file with ranks in any order becomes a tokenizer that gives tiktoken's ids."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.tiktoken_conversion import convert_tiktoken
from megatron_taipan.tokenizer.tiktoken_file import LLAMA3_PATTERN

tiktoken = pytest.importorskip("tiktoken")


def both(path, tokens):
    """Encoders of both libraries for the bytes and these tokens, in this order."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token.encode(): 256 + k for k, token in enumerate(tokens)}
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    theirs = tiktoken.Encoding("x", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = convert_tiktoken(path)
    return lambda text: ours.encode(text, add_special_tokens=False).ids, theirs.encode


def test_a_token_before_what_it_is_joined_from(tmp_path):
    ours, theirs = both(tmp_path / "tokenizer.model", ["abc", "ab"])
    assert ours("xabcx") == theirs("xabcx") == [ord("x"), 256, ord("x")]
    ours, theirs = both(tmp_path / "tokenizer.model", ["abcd", "bc"])  # from which no two parts are joined to it
    assert ours("xabcdx") == theirs("xabcdx") == [*b"xa", 257, *b"dx"] and ours("abcd") == theirs("abcd") == [256]


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.permutations(["ab", "abc", "bc", "bcc", "ccab", "cab", "aab", "abcabc", "bb", "ca", "aa", "aaa"]),
    count=st.integers(1, 12),
    text=st.text("abc", max_size=40),
)
def test_ids_are_equal_whatever_the_order_of_the_ranks(tmp_path_factory, tokens, count, text):
    ours, theirs = both(tmp_path_factory.mktemp("t") / "tokenizer.model", tokens[:count])
    assert ours(text) == theirs(text)
