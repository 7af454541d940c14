"""Generation: greedy equals argmax over full forwards, batches equal single prompts, stops and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.errors import UserError
from megatron_taipan.inference.generation import generate, usual_chunk
from megatron_taipan.inference.sampling import Sampling
from tests.inference.networks import VOCABULARY, small_model

PATTERN = "M S W M A"


def by_full_forwards(model, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation without any cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_argmax_over_full_forwards():
    model = small_model(PATTERN)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    got = generate(model, [prompt], max_new_tokens=15)[0]
    assert got == by_full_forwards(model, prompt, 15)
    assert len(set(got)) > 3  # a constant output would hide a broken cache


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), min_size=2, max_size=4),
    st.integers(1, 9),
    st.sampled_from([0.0, 1.0]),
)
def test_a_batch_of_different_lengths_equals_single_prompts(prompts, chunk, temperature):
    model = small_model(PATTERN)
    sampling = Sampling(temperature=temperature, seed=5)
    batch = generate(model, prompts, max_new_tokens=6, sampling=sampling, prefill_chunk=chunk)
    # Row i draws from (seed, i), so a prompt on its own is compared at the same row, behind one-token fillers.
    for row, prompt in enumerate(prompts):
        alone = generate(model, [[0]] * row + [prompt], max_new_tokens=6, sampling=sampling)[row]
        assert batch[row] == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_end_at_their_stop_token_and_the_others_go_on_unchanged(temperature):
    model, sampling = small_model(PATTERN), Sampling(temperature=temperature, seed=3)
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11], [20]]
    free = generate(model, prompts, max_new_tokens=12, sampling=sampling)
    stop = free[0][4]
    stopped = generate(model, prompts, max_new_tokens=12, sampling=sampling, stop_tokens=(stop,))
    for before, after in zip(free, stopped, strict=True):
        wanted = before[: before.index(stop) + 1] if stop in before else before
        assert after == wanted
    assert len(stopped[0]) < len(stopped[1])


def test_the_seed_decides_the_text():
    model = small_model(PATTERN)
    draws = [
        generate(model, [[1, 2, 3]], max_new_tokens=10, sampling=Sampling(temperature=1.0, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_no_row_draws_what_a_row_of_another_seed_draws():
    """Else batches with seeds 0, 1, 2, ... would hold most of their texts several times."""
    model = small_model(PATTERN)

    def batch(seed: int) -> list[list[int]]:
        return generate(model, [[1, 2, 3]] * 3, max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=seed))

    texts = [tuple(text) for seed in range(3) for text in batch(seed)]
    assert len(set(texts)) == len(texts) == 9


def test_generation_leaves_the_mode_and_takes_no_gradient():
    model = small_model(PATTERN).train()
    generate(model, [[1]], max_new_tokens=1)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("prompts", "words"),
    [([], "no prompt"), ([[1], []], "prompt 1 has no token"), ([[1, VOCABULARY]], f"vocabulary of {VOCABULARY}")],
)
def test_bad_prompts_are_refused(prompts, words):
    with pytest.raises(UserError, match=words):
        generate(small_model("M"), prompts, max_new_tokens=1)


def test_a_gpu_reads_more_of_a_prompt_at_once_the_fewer_rows_there_are():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [usual_chunk(gpu, rows) for rows in (1, 2, 4, 64)] == [8192, 4096, 2048, 2048]
    assert {usual_chunk(cpu, rows) for rows in (1, 64)} == {2048}
