"""Prefill and decoding with the cache give what one forward pass over the whole sequence gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.inference.networks import VOCABULARY, small_model

PATTERNS = ["M", "S", "W", "A", "M S", "M W M A", "S M A W", "A S"]


def documents(draw: st.DrawFn, rows: int, length: int) -> Tensor:
    """Non-decreasing document numbers [rows, length] with random lengths, different in each row."""
    starts = [draw(st.sets(st.integers(1, length - 1), max_size=4)) for _ in range(rows)]
    marks = torch.zeros(rows, length, dtype=torch.int32)
    for row, begins in enumerate(starts):
        marks[row, list(begins)] = 1
    return marks.cumsum(1, dtype=torch.int32)


def chunked(model, tokens: Tensor, seq_idx: Tensor | None, cuts: list[int]) -> Tensor:
    """Logits of all positions, the sequence fed to the cache in pieces."""
    cache = model.new_cache(tokens.shape[0])
    parts, ends = [], [*cuts, tokens.shape[1]]
    for start, end in zip([0, *cuts], ends, strict=True):
        part = None if seq_idx is None else seq_idx[:, start:end]
        parts.append(model(tokens[:, start:end], seq_idx=part, cache=cache).logits)
    return torch.cat(parts, 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_chunking_of_packed_documents_equals_the_full_forward(data):
    model = small_model(data.draw(st.sampled_from(PATTERNS)))
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 30))
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))
    seq_idx = documents(data.draw, rows, length) if data.draw(st.booleans()) else None
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6)))
    with torch.no_grad():
        whole = model(tokens, seq_idx=seq_idx).logits
        torch.testing.assert_close(chunked(model, tokens, seq_idx, cuts), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_token_by_token_equals_the_full_forward_far_beyond_the_window(pattern):
    model = small_model(pattern)
    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stepwise = chunked(model, tokens, None, list(range(1, 40)))
        torch.testing.assert_close(stepwise, model(tokens).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("pattern", "grows"), [("M S W", False), ("M A", True)])
def test_memory_is_constant_without_full_attention(pattern, grows):
    model = small_model(pattern)
    cache = model.new_cache(1)
    tokens = torch.zeros(1, 1500, dtype=torch.int64)
    with torch.no_grad():
        model(tokens[:, :10], cache=cache)
        before = cache.n_bytes()
        model(tokens[:, 10:700], cache=cache)
        for at in range(700, 710):
            model(tokens[:, at : at + 1], cache=cache)
    assert (cache.n_bytes() > before) == grows


def test_selected_rows_of_the_cache_go_on_as_they_were():
    model = small_model("M S A")
    tokens = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        whole = model(tokens).logits
        cache = model.new_cache(3)
        model(tokens[:, :12], cache=cache)
        cache.select(order)
        rest = model(tokens[order, 12:], cache=cache).logits
    torch.testing.assert_close(rest, whole[order, 12:], rtol=0, atol=1e-9)
