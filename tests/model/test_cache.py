"""What decoding remembers. (tests/inference/test_decoding.py compares chunked decoding with whole passes.)"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.model.cache import KeyValueStore
from tests.model.small import close, small_model, tokens

PATTERNS = ["M", "S", "W", "A", "M S A W"]


@settings(max_examples=60)
@given(st.none() | st.integers(1, 7), st.lists(st.integers(1, 20), min_size=1, max_size=25))
def test_store_gives_every_visible_key_at_its_position(window, chunks):
    """Against a plain list; chunks shorter and longer than the window and the buffer, many moves of the buffer."""
    store = KeyValueStore(2, 1, 1, window, "cpu", torch.float64)
    seen = 0
    for new in chunks:
        positions = torch.arange(seen, seen + new, dtype=torch.float64)
        k = torch.stack([positions, 1000 + positions])[..., None, None]
        keys, values, first = store.append(k, -k)
        assert keys.shape == values.shape and first <= seen
        for position in range(seen, seen + new):
            lowest = 0 if window is None else max(0, position - window + 1)
            visible = slice(lowest - first, position - first + 1)
            assert lowest >= first
            expected = torch.arange(lowest, position + 1, dtype=torch.float64)
            for row, offset in ((0, 0), (1, 1000)):
                assert torch.equal(keys[row, visible, 0, 0], expected + offset)
                assert torch.equal(values[row, visible, 0, 0], -expected - offset)
        seen += new
    if window is not None:
        assert store.keys.shape[1] == 2 * window


@pytest.mark.parametrize("pattern", PATTERNS)
def test_left_padding_of_any_length_leaks_nothing(pattern):
    """Rows of different lengths, pads as document 0 in front, fed in chunks that cut pads and text alike."""
    model = small_model(pattern).eval()
    lengths, longest = (3, 9, 14), 14
    rows, marks = tokens(3, longest), torch.ones(3, longest, dtype=torch.int32)
    for row, length in enumerate(lengths):
        marks[row, : longest - length] = 0
    tail = tokens(3, 10, 1)
    with torch.no_grad():
        cache = model.new_cache(3)
        first = [model(rows[:, a:b], seq_idx=marks[:, a:b], cache=cache).logits for a, b in ((0, 4), (4, 13), (13, 14))]
        # From here on every row continues its document, so that nothing need be said of documents.
        steps = [model(tail[:, i : i + 1], cache=cache).logits for i in range(10)]
        padded = torch.cat([*first, *steps], 1)
        for row, length in enumerate(lengths):
            alone = model(torch.cat([rows[row : row + 1, longest - length :], tail[row : row + 1]], 1)).logits
            close(padded[row : row + 1, longest - length :], alone)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_new_document_forgets_in_some_rows_only(pattern):
    """In single steps: row 0 starts a document at its 8th token, row 1 goes on."""
    model = small_model(pattern).eval()
    rows = tokens(2, 20)
    marks = torch.zeros(2, 20, dtype=torch.int32)
    marks[0, 7:] = 1
    with torch.no_grad():
        cache = model.new_cache(2)
        steps = [model(rows[:, i : i + 1], seq_idx=marks[:, i : i + 1], cache=cache).logits for i in range(20)]
        steps = torch.cat(steps, 1)
        close(steps[0, 7:], model(rows[:1, 7:]).logits[0])
        close(steps[1], model(rows[1:]).logits[0])


def test_memory_of_state_and_window_layers_is_what_the_sizes_say():
    """And does not depend on how much was read."""
    model = small_model("M S W", torch.float32).eval()
    cache = model.new_cache(3)
    channels, window = 48 + 2 * 2 * 8, 6
    floats = 3 * channels + 6 * 8 * 8 + 2 * (2 * 2 * window * 2 * 6)  # conv tail, SSM state, keys and values of S and W
    assert cache.n_bytes() == 3 * 4 * floats
    with torch.no_grad():
        for length in (1, 40, 3, 100):
            model(tokens(3, length), cache=cache)
            assert cache.n_bytes() == 3 * 4 * floats
    assert cache.length == 144


def test_full_attention_keeps_every_key():
    cache = (model := small_model("A", torch.float32).eval()).new_cache(1)
    with torch.no_grad():
        model(tokens(1, 700), cache=cache)
    assert cache.n_bytes() >= 700 * 2 * 2 * 6 * 4
    assert cache.n_bytes() < 3 * 700 * 2 * 2 * 6 * 4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_selected_and_repeated_rows_go_on_independently(pattern):
    """As beam search needs: copies of one row take different tokens, also in rows of different documents."""
    model = small_model(pattern).eval()
    rows, tails = tokens(2, 11), tokens(3, 5, 1)
    marks = torch.zeros(2, 11, dtype=torch.int32)
    marks[1, 4:] = 1
    index = torch.tensor([1, 0, 1])
    with torch.no_grad():
        cache = model.new_cache(2)
        model(rows, seq_idx=marks, cache=cache)
        cache.select(index)
        rest = torch.cat([model(tails[:, i : i + 1], cache=cache).logits for i in range(5)], 1)
        whole_marks = torch.cat([marks[index], marks[index][:, -1:].expand(3, 5)], 1)
        whole = model(torch.cat([rows[index], tails], 1), seq_idx=whole_marks).logits
    close(rest, whole[:, 11:])
