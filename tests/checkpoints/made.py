"""What the tests of exports start from: a state in memory, a tokenizer trained on this repository's own text."""

import random
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch

from megatron_taipan.config import Config, ModelConfig, make_config
from megatron_taipan.model.taipan import Taipan
from tests.inference.networks import small_config

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class MemoryState:
    """Looks like megatron_taipan.checkpoint.merge.TrainedState."""

    config: Config
    weights: dict[str, torch.Tensor]
    step: int = 7

    def names(self) -> list[str]:
        return list(self.weights)

    def load(self, name: str) -> torch.Tensor:
        return self.weights[name]


def memory_state(pattern: str = "M S W", seed: int = 4, **changes) -> MemoryState:
    """Initial weights of a small network, the gate's threshold moved away from its default."""
    model_config: ModelConfig = small_config(pattern, **changes)
    tree = {
        "model": model_config.model_dump(mode="json"),
        "data": {"train": "no/such/data", "seq_len": 32},
        "optim": {"warmup_steps": 0},
        "train": {"steps": 9, "global_batch": 2, "precision": "fp32"},
        "checkpoint": {"dir": "unused"},
    }
    weights = dict(Taipan(model_config, seed=seed).state_dict())
    for name in weights:
        if name.endswith("threshold"):
            weights[name] = torch.tensor(0.125)
    return MemoryState(make_config(tree), weights)


def lines_of_text() -> list[str]:
    """Real text: the sources of this repository, line by line."""
    files = sorted(ROOT.glob("megatron_taipan/**/*.py"))
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def train_sentencepiece(folder: Path, **options) -> Path:
    """Trains a small sentencepiece model; exactly convertible unless options say otherwise."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(random.Random(0).sample(lines_of_text(), 2000)), encoding="utf-8")
    settings = {
        "vocab_size": 600,
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(folder / "tok"), **settings | options)
    return folder / "tok.model"
