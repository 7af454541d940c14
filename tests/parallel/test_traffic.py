"""Collectives per layer type: exactly the calls and bytes of the formula, and the papers' numbers."""

import pytest
import torch

from benchmarks.comm import measure_traffic
from megatron_taipan.gate_config import GateConfig
from megatron_taipan.model_config import AttentionConfig, MambaConfig, ModelConfig
from tests.distributed.launch import launch

D, BATCH, LENGTH = 32, 2, 24
STREAM = BATCH * LENGTH * D * 4  # bytes
PATTERNS = ["M", "S", "S all", "W", "A", "M*2 S W A"]


def network(pattern: str, shared: bool) -> ModelConfig:
    pattern, every = pattern.removesuffix(" all"), pattern.endswith(" all")
    return ModelConfig(
        gate=GateConfig(gradient="all" if every else "selected"),
        pattern=pattern, vocab_size=97, d_model=D, d_ff=48,
        mamba=MambaConfig(d_state=8, headdim=8, chunk_size=8, n_groups=1 if shared else 2),
        attention=AttentionConfig(n_heads=4, n_kv_heads=1 if shared else 2, window=9),
    )  # fmt: skip


def count_all() -> list:
    cases = [(p, shared, sequence) for p in PATTERNS for shared in (False, True) for sequence in (False, True)]
    cpu = torch.device("cpu")
    return [
        (case, *measure_traffic(network(*case[:2]), sequence=case[2], batch=BATCH, length=LENGTH, device=cpu))
        for case in cases
    ]


@pytest.fixture(scope="module")
def counted():
    return launch(2, count_all)[0]


def test_formula_matches_what_was_sent(counted):
    for case, sent, expected in counted:
        assert (sent.calls, sent.bytes) == (expected.calls, expected.bytes), case


def test_papers_numbers(counted):
    """Mamba-2: one all-reduce a block and direction; Megatron's attention and MLP: two. Written out, not by formula."""
    sent = {case: traffic for case, traffic, _ in counted}
    head_and_embedding = 2 * STREAM + 3 * 4 * BATCH * LENGTH
    assert sent["M", False, False].bytes["all_reduce"] == head_and_embedding + 2 * STREAM
    for letter in ("S all", "W", "A"):
        assert sent[letter, False, False].bytes["all_reduce"] == head_and_embedding + 4 * STREAM
    assert sent["S", False, False].bytes["all_reduce"] < head_and_embedding + 4 * STREAM
    # with sequence parallelism every all-reduce of the stream becomes an all-gather and a reduce-scatter
    assert sent["M", False, True].bytes["reduce_scatter"] == 4 * STREAM
    assert sent["M", False, True].bytes["all_gather"] == 5 * STREAM  # the block's input once more in the backward pass
