"""Scoring of values: by generation and by ranking they agree, and prompts take up the length that they are given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation import found_again
from megatron_taipan.evaluation.found_again import (
    Example,
    RankedText,
    count_ranked_first,
    find_values,
    is_value,
    longest_fit,
)
from megatron_taipan.inference.generation import generate
from megatron_taipan.tokenizer.load import load_tokenizer_file
from tests.checkpoints.made import train_sentencepiece
from tests.inference.networks import VOCABULARY, small_model


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (" 12345.", True),
        ("12345", True),
        ("12345 is", True),
        (" 1234", False),
        (" the 12345", False),
        ("123456", False),
    ],
)
def test_an_answer_begins_with_the_value_and_nothing_goes_on_with_it(reply, right):
    assert is_value(reply, "12345") == right


def test_values_are_found_by_what_generation_writes(tmp_path, monkeypatch):
    codec = load_tokenizer_file(train_sentencepiece(tmp_path))
    replies = [codec.encode(text) for text in (" 12345.", " 12345", " 1234", " the 12345")]
    monkeypatch.setattr(found_again, "generate", lambda *_, **__: [[*ids, *codec.end_ids] for ids in replies])
    assert find_values(None, codec, [Example([1], "12345")] * 4) == [True, True, False, False]


@pytest.mark.parametrize("chunk", [1, 7, 2048])
@pytest.mark.parametrize("pattern", ["M S W", "A"])
def test_ranked_first_is_what_greedy_generation_writes(pattern, chunk):
    model = small_model(pattern)
    draw = torch.Generator().manual_seed(0)
    tokens, places = torch.randint(VOCABULARY, (9,), generator=draw).tolist(), []
    for _ in range(3):
        new = generate(model, [tokens], max_new_tokens=3)[0]
        places.append(range(len(tokens), len(tokens) + 3))
        tokens += [*new, *torch.randint(VOCABULARY, (4,), generator=draw).tolist()]
    assert count_ranked_first(model, RankedText(tokens, places), chunk) == 3
    for at in places[1]:  # one wrong token of a value makes it wrong, in the middle as at its ends
        other = [*tokens[:at], (tokens[at] + 1) % VOCABULARY, *tokens[at + 1 :]]
        assert count_ranked_first(model, RankedText(other, [places[0], places[1]]), chunk) == 1
        assert count_ranked_first(model, RankedText(other, [range(at, at + 1)]), chunk) == 0
        assert count_ranked_first(model, RankedText(tokens, [range(at, at + 1)]), chunk) == 1


class Letters:
    """A tokenizer of characters."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@settings(max_examples=60)
@given(st.integers(0, 300), st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_the_longest_text_that_fits_is_found(length, sizes):
    def text(n: int) -> str:
        return "x" * (5 + sum(sizes[i % len(sizes)] for i in range(n)))

    if length < 5:
        with pytest.raises(UserError, match="do not fit into"):
            longest_fit(text, Letters(), length)
        return
    wanted = max(n for n in range(301) if len(text(n)) <= length)
    assert longest_fit(text, Letters(), length) == text(wanted)


@pytest.mark.parametrize(("first", "later"), [(9, 10), (10, 9), (1, 40), (40, 30)])
def test_a_text_of_a_million_tokens_is_made_a_few_times(first, later):
    """Also where the sentences that the guess is made by are not as long as the others."""
    made = []

    def text(n: int) -> str:
        made.append(n)
        return "x" * (first * min(n, 8) + later * max(n - 8, 0))

    length = 1 << 20
    found = longest_fit(text, Letters(), length)
    assert length - later < len(found) <= length
    assert len(made) < 40
