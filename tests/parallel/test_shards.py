"""The stream in shards of the tokens: wherever the cuts fall in the rows, the network gives what one process gives."""

import pytest
import torch
import torch.distributed as dist

from megatron_taipan.model.gate_settings import settled
from megatron_taipan.model.graphs import LayerGroup
from megatron_taipan.model.recompute import recompute_of
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.connect import connect
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.parallel_config import ParallelConfig
from tests.distributed.launch import launch
from tests.model.small import small_config, tokens

PATTERN = "M S W A M"
# rows, tokens a row: cuts of two ranks between rows, within the middle one, within the only one
SHAPES = [(2, 12), (3, 8), (1, 12)]


def network(tp: TensorParallel | None = None, recompute: str = "none") -> Taipan:
    config = small_config(PATTERN, mamba={"headdim": 4})
    return Taipan(config, seed=3, tensor_parallel=tp, recompute=recompute).double()


def outcome(model: Taipan, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Losses, statistics of the gate, the norm's and the gate's gradients; logits of all tokens and of the last."""
    batch = tokens(rows, length + 1)
    seq_idx = (torch.arange(length) >= 5).int().expand(rows, length)  # two documents a row
    out = model(batch[:, :-1], labels=batch[:, 1:], seq_idx=seq_idx, step=2)
    model.zero_grad()
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "norm.weight" in name or "gate." in name}
    model.eval()
    with torch.no_grad():
        every, last = (model(batch[:, :-1], seq_idx=seq_idx, all_logits=whole).logits for whole in (True, False))
    model.train()
    stats = model.named_metrics(out)
    return {"loss": out.loss, "budget_loss": out.budget_loss, "all": every, "last": last, **stats, **gradients}


def ranks(**parallel) -> TensorParallel:
    config = ParallelConfig(**{"tensor": dist.get_world_size(), "sequence": True, "timeout_s": 60} | parallel)
    return connect(config, torch.device("cpu"), 12)[0].tensor


def outcomes(recompute: str, parallel: dict) -> list[dict[str, torch.Tensor]]:
    model = network(ranks(**parallel), recompute)
    return [{name: value.detach() for name, value in outcome(model, *shape).items()} for shape in SHAPES]


def round_trip() -> list[bool]:
    """Three rows of six tokens of two numbers, cut in two: in shards and whole again, and a shard at its place."""
    tp = ranks()
    whole = torch.arange(36.0).view(3, 6, 2)
    mine = tp.shard_sequence(whole)
    places = tp.embed_shard(mine[:, 0]).view(3, 6)
    expected = torch.where((torch.arange(18) // 9 == tp.rank).view(3, 6), whole[..., 0], 0)
    return [torch.equal(tp.gather_sequence(mine), whole.view(18, 2)), torch.equal(places, expected)]


def test_taking_and_putting_tokens_are_inverse():
    assert launch(2, round_trip) == [[True, True], [True, True]]


CASES = [  # processes; recomputation; products in chunks, or a collective and then the product
    (2, "none", {}),
    (4, "none", {}),
    (2, "none", {"overlap": False}),
    (2, "selective", {}),
    (2, "selective", {"overlap": False}),
    (2, "full", {}),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def sharded(request):
    size, recompute, parallel = request.param
    return launch(size, outcomes, recompute, parallel)


@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_sharded_network_equals_the_whole_one(sharded, case):
    expected = outcome(network(), *SHAPES[case])
    for rank in sharded:
        assert rank[case].keys() == expected.keys()
        for name, value in expected.items():
            tolerance = 1e-9 if value.dtype == torch.float64 else 1e-6  # the gate's statistics are float32
            torch.testing.assert_close(rank[case][name], value.detach(), rtol=tolerance, atol=1e-11, msg=name)


def gradients_of_a_group(ahead: bool, recompute: str) -> tuple[dict[str, torch.Tensor], int]:
    """Every parameter's gradient of all layers as one group, and the all-reduces that they took."""
    tp = ranks()
    model = network(tp)
    group = LayerGroup(list(model.layers), recompute_of(recompute, 1, tp), tp)
    rows, length = 2, 12
    h = torch.randn(rows * length, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch_meta = torch.zeros(rows, length, dtype=torch.int32), torch.arange(rows), torch.zeros((), dtype=torch.int64)
    told = settled(model.config.gate).pack(model.config.letters.count("S"), h.device)
    inputs = tp.shard_sequence(h.view(rows, length, 24)), *batch_meta, told
    tp.counter.reset()
    out, _, budget = group.with_parameters(*group.own, *inputs) if ahead else group(*inputs)
    torch.autograd.backward((out, budget), (out.detach(), torch.ones_like(budget)))
    return {name: p.grad for name, p in model.layers.named_parameters()}, tp.counter.calls["all_reduce"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_summed_ahead_are_those_summed_by_each_layer(size, recompute):
    by_layer, summed_ahead = (launch(size, gradients_of_a_group, *way) for way in ((False, "none"), (True, recompute)))
    for (each, often), (ahead, seldom) in zip(by_layer, summed_ahead, strict=True):
        assert seldom < often - 5 or recompute != "none"
        assert each.keys() == ahead.keys()
        for name, gradient in each.items():
            torch.testing.assert_close(ahead[name], gradient, rtol=1e-12, atol=1e-14, msg=name)
