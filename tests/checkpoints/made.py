"""What the tests of exports start from: a state in memory, a tokenizer trained on this repository's own text."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_taipan.checkpoint import folder
from megatron_taipan.checkpoint.files import TEMPORARY, TensorFile, size_and_sha256
from megatron_taipan.checkpoint.reader import INDEX
from megatron_taipan.checkpoint.weights import open_checkpoint
from megatron_taipan.config import Config
from megatron_taipan.config_loading import make_config
from megatron_taipan.config_text import dump_config
from megatron_taipan.engine.state_shards import KINDS, MASTER
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parameters import parameter_table
from tests.inference.networks import small_config

ROOT = Path(__file__).resolve().parents[2]
# what every manifest of data_prep has; a test adds what it is about
MANIFEST = {"format": "data_prep manifest 1", "documents": 1, "tokens": 9, "tokenizer": {"name": "t"}}


@dataclass
class MemoryState:
    """Looks like megatron_taipan.checkpoint.weights.CheckpointWeights."""

    config: Config
    weights: dict[str, torch.Tensor]
    step: int = 7
    tokens: int = 500  # not 7 batches of the configuration: an earlier start had others
    path: Path = Path("no/such/run/step_00000007")

    @property
    def network(self) -> ModelConfig:
        return self.config.model

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


def write_checkpoint(out: Path, config: Config, load: Callable[[str], torch.Tensor], *, moments: bool = True) -> Path:
    """A complete checkpoint of one process without any training: step 7, moments zero; one tensor in memory at a time.

    Args:
        load: gives a parameter's value by its name; asked for one after the other.
    """
    table, kinds = parameter_table(config.model), KINDS if moments else (MASTER,)
    contents = folder.FULL if moments else folder.WEIGHTS
    final = out / folder.folder_name(7, contents)
    temporary = final.with_name(final.name + TEMPORARY)
    (temporary / folder.STATE).mkdir(parents=True)
    sizes = {name: torch.Size(spec.shape).numel() for name, spec in table.items()}
    gates = [f"layers.{index}.gate.threshold" for index, letter in enumerate(config.model.letters) if letter == "S"]
    specs = {f"{name}|{kind}": ((size,), torch.float32) for name, size in sizes.items() for kind in kinds}
    name_in_state = "rank_00000.safetensors"
    file = TensorFile(
        temporary / folder.STATE / name_in_state, specs | {f"{name}|buffer": ((), torch.float32) for name in gates}
    )
    for name in table:
        file.put(f"{name}|{MASTER}", load(name).reshape(-1))
    for name in gates:
        file.put(f"{name}|buffer", torch.tensor(config.model.gate.threshold))
    file.finish()
    index = {
        "parameters": {name: [[name_in_state, 0, 0, size]] for name, size in sizes.items()},
        "buffers": dict.fromkeys(gates, name_in_state), "tensor": 1, "processes": 0, "optimizer_step": 7,
        "scaler": None,
    }  # fmt: skip
    metadata = {
        "format": folder.FORMAT, "contents": contents, "identity": {}, "layout": {"processes": 1},
        "progress": {"step": 7, "samples": 0, "tokens": 0, "skipped": 0},
    }  # fmt: skip
    texts = {
        INDEX: json.dumps(index),
        folder.CONFIG: dump_config(config),
        folder.METADATA: json.dumps(metadata),
    }
    state = f"{folder.STATE}/{name_in_state}"
    folder.complete_checkpoint(temporary, final, texts, {state: size_and_sha256(temporary / state, flush=False)})
    return final


def write_weights(folder: Path, model: Taipan) -> Path:
    """The folder's format, written with the safetensors library."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"network": model.config.model_dump(mode="json")}))
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def read_all(place: Path) -> dict[str, Tensor]:
    """Every parameter and buffer of a checkpoint by full name, full float32 tensors."""
    weights = open_checkpoint(place)
    return {name: weights.load(name) for name in weights.names()}
