"""Passkey retrieval: the prompts are what they claim to be, and right and wrong answers are told apart."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.passkey import FILLER, QUESTION, main, make_example
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.tokenizer.load import load_tokenizer_file
from tests.checkpoint.test_weights import write_weights
from tests.checkpoints.made import train_sentencepiece
from tests.evaluation.readers import reading_generate
from tests.inference.networks import small_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("passkey"))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(120, 1500), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(10000, 99999))
def test_a_prompt_has_its_length_and_its_key_at_its_depth(tokenizer, length, depth, key):
    codec = load_tokenizer_file(tokenizer)
    example = make_example(codec, length, depth, str(key))
    assert length - len(codec.encode(FILLER)) < len(example.prompt) <= length
    text = codec.decode(example.prompt)
    assert text.count(str(key)) == 2 and text.endswith(QUESTION)
    filler = text.replace(QUESTION, "")
    before, after = filler.split(f"The pass key is {key}. Remember it. {key} is the pass key. ")
    rounds = (len(before) + len(after)) // len(FILLER)
    assert before.count(FILLER) == round(rounds * depth) and after.count(FILLER) == rounds - round(rounds * depth)


def test_too_short_a_length_is_refused(tokenizer):
    with pytest.raises(UserError, match="needle and question"):
        make_example(load_tokenizer_file(tokenizer), 10, 0.5, "12345")


def test_a_model_that_reads_gets_everything_and_an_untrained_one_nothing(tokenizer, tmp_path, monkeypatch, capsys):
    weights = write_weights(tmp_path / "weights", Taipan(small_config("M S", vocab_size=600)))
    arguments = [str(weights), "--tokenizer", str(tokenizer), "--lengths", "120,300", "--depths", "3", "--samples", "2"]
    assert main(arguments) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert table == [["120", "0.00", "0.00", "0.00"], ["300", "0.00", "0.00", "0.00"]]

    codec = load_tokenizer_file(tokenizer)

    monkeypatch.setattr("megatron_taipan.evaluation.found_again.generate", reading_generate(codec))
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("1.00") == 6 + 1  # and the header's depth 1.00
    assert main([*arguments[:3], "--lengths", "many"]) == 2
