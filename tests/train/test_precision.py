"""Two hundred steps on real text: bf16 learns what fp32 learns."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_taipan.config_loading import load_config
from megatron_taipan.config_text import dump_config
from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.parallel.processes import find_place, free_port, stop_processes
from megatron_taipan.train.distributed import start_processes
from tests.distributed.launch import ROOT, launch, process_env
from tests.train.runs import log, runs

# The quickstart's run on the bytes of its text, narrower and with shorter samples: two chunks and two windows in each.
OVERRIDES = [
    "model.vocab_size=256", "model.d_model=64", "model.d_ff=128", "model.mamba.d_state=16", "model.mamba.headdim=16",
    "model.mamba.chunk_size=32", "model.attention.n_heads=2", "model.attention.window=32", "data.seq_len=64",
    "data.tokenizer=null", "train.micro_batch=8", "train.steps=200", "train.eval_every=0", "checkpoint.save_every=0",
    "log.tensorboard=false", "log.every=50",
]  # fmt: skip


def write_bytes(prefix: Path, documents: int = 40) -> str:
    """The first speeches of the sample as one id a byte."""
    (sample,) = (ROOT / "data_prep" / "sample").glob("*.jsonl.gz")
    with gzip.open(sample, "rt", encoding="utf-8") as lines, IndexedWriter(prefix, np.uint16) as writer:
        for _, line in zip(range(documents), lines, strict=False):
            writer.add_document(np.frombuffer(json.loads(line)["text"].encode(), np.uint8).astype(np.int64))
    return str(prefix)


def one_each(trees: list[dict]) -> list:
    """Runs like `runs`, but each process trains a configuration of its own, alone."""
    tree = trees[int(os.environ["RANK"])]
    os.environ.update(process_env(0, 1, free_port()))
    start_processes(find_place(os.environ), torch.device("cpu"), 500)
    done = runs([tree])
    stop_processes()
    return done


@pytest.mark.slow
def test_bf16_stays_within_one_percent_of_fp32(tmp_path):
    prefix = write_bytes(tmp_path / "speeches")
    trees = []
    for precision in ("fp32", "bf16"):
        paths = [f"data.train={prefix}", f"checkpoint.dir={tmp_path / precision}", f"train.precision={precision}"]
        config = load_config(ROOT / "launch" / "configs" / "quickstart.yaml", OVERRIDES + paths)
        assert f"precision: {precision}" in dump_config(config)
        trees.append(config.model_dump(mode="json"))
    assert launch(2, one_each, trees, timeout=500, join=False) == [[0], [0]]
    full, low = ([record["ce"] for record in log(tmp_path / p)] for p in ("fp32", "bf16"))
    assert len(full) == 200 and np.mean(full[-20:]) < 0.6 * full[0], "nothing was learned"
    assert full != low, "both ran in the same precision"
    for start in range(0, 200, 20):
        ours, theirs = np.mean(low[start : start + 20]), np.mean(full[start : start + 20])
        assert abs(ours - theirs) < 0.01 * theirs, (start, ours, theirs)
