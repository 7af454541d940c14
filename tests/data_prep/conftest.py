"""The real text and the tokenizers that these tests share."""

import gzip
import json
from pathlib import Path

import pytest

from data_prep import cli

SAMPLE = Path(__file__).parents[2] / "data_prep/sample/state_of_the_union.jsonl.gz"


@pytest.fixture(scope="package")
def speeches() -> list[str]:
    """The 103 speeches of the sample corpus."""
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    """A sentencepiece BPE model, trained here."""
    path = tmp_path_factory.mktemp("model") / "tok.model"
    assert cli.main(["train-tokenizer", "--input", str(SAMPLE), "--output", str(path), "--vocab-size", "2000"]) == 0
    return str(path)


@pytest.fixture(scope="package")
def gpt2_like(tmp_path_factory, speeches):
    """A byte-level BPE tokenizer.json of the GPT-2 family, trained here."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(speeches[:30], trainer)
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    made.save(str(path))
    return str(path)
