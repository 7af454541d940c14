"""Layers replayed as CUDA graphs give what they give one by one: losses, statistics and every gradient, bit for bit.

Each comparison asserts that it is one: micro-batches that a graph does not fit run one by one, without a word.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.ops.dispatch import pick_ops
from tests.model.replays import Passes, watched_passes

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

CONFIG = {
    "vocab_size": 300, "d_model": 128, "d_ff": 256, "pattern": "M*3 S M W A S",
    "mamba": {"d_state": 32, "headdim": 32}, "attention": {"n_heads": 2, "window": 64}, "gate": {"capacity": 0.3},
}  # fmt: skip


def made(recompute: str, gradient: str, *, joined: bool = True, again: tuple[str, ...] = (), **gate) -> Taipan:
    """joined: whether attention of every query, of which some learn, is one operation, where the gate's gradient is
    "all"."""
    config = CONFIG | {"gate": {**CONFIG["gate"], "gradient": gradient, **gate}}
    with torch.device("cuda"):
        ops = pick_ops("fast", recompute_mixer=again)
        assert ops.every_query is not None
        ops = ops if joined else replace(ops, every_query=None)
        return Taipan(ModelConfig.model_validate(config), seed=1, recompute=recompute, ops=ops).bfloat16()


def batch(number: int) -> dict:
    tokens = torch.randint(0, 300, (2, 200), generator=torch.Generator().manual_seed(number)).cuda()
    seq_idx = (torch.arange(200, device="cuda") >= 50 * number).int().expand(2, -1)
    samples = torch.tensor([3, 8], device="cuda") + number
    return {"tokens": tokens, "labels": tokens.roll(1, 1), "seq_idx": seq_idx, "samples": samples, "step": number}


def outcome(model: Taipan, number: int, **more) -> list[torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    out = model(**batch(number), **more)
    out.loss.backward()
    return [t.detach().clone() for t in (out.loss, out.metrics, *(p.grad for p in model.parameters()))]


@pytest.fixture
def passes() -> Iterator[Passes]:
    """What this test's passes were."""
    with watched_passes() as watched:
        yield watched


def assert_half_replayed(passes: Passes, times: int) -> None:
    """That many replays, of two graphs each way, and as many passes with which to compare them."""
    assert passes.replayed == passes.one_by_one == [(2, 200)] * times
    assert passes.launches == 4 * times


@pytest.mark.parametrize(("recompute", "gradient", "joined"), [
    ("none", "selected", True), ("none", "all", True), ("none", "all", False), ("selective", "selected", True),
    ("selective", "all", True), ("selective", "all", False), ("full", "selected", True),
])  # fmt: skip
def test_replayed_layers_equal_layers_one_by_one(passes, recompute, gradient, joined):
    plain, graphed = (made(recompute, gradient, joined=joined) for _ in range(2))
    graphed.capture(2, 200)
    losses = set()
    for number in (1, 2, 3):  # other tokens, documents, samples and steps each time
        if number == 3:  # an update in place is seen
            for model in (plain, graphed):
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1.01)
        expected, got = outcome(plain, number), outcome(graphed, number)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        losses.add(float(got[0]))
    assert len(losses) == 3  # or replays would not see their inputs
    assert_half_replayed(passes, 3)


def test_what_mixers_compute_again_changes_no_bit(passes):
    plain, graphed = made("none", "selected"), made("none", "selected", again=("states", "conv"))
    graphed.capture(2, 200)
    for number in (1, 2):
        for a, b in zip(outcome(plain, number), outcome(graphed, number), strict=True):
            assert torch.equal(a, b)
    assert_half_replayed(passes, 2)


def test_replays_follow_schedules(passes):
    """C, tau, lambda, which steps compute every query, and the shares of the step before: another value in each."""
    options = {"budget": "batch", "refinement": "add", "input_gradient": "task"}
    plain, graphed = made("none", "sampled", **options), made("none", "sampled", **options)
    graphed.capture(2, 200)
    seen = []
    for told in ([0.9, 1.0, 0.5, 0, 0.5, 0.7], [0.4, 0.6, 3.0, 1, 0.2, 0.3], [0.4, 0.6, 3.0, 0, 0.2, 0.3]):
        gate = torch.tensor(told, device="cuda")
        seen.append(outcome(graphed, 1, gate=gate))
        for a, b in zip(outcome(plain, 1, gate=gate), seen[-1], strict=True):
            assert torch.equal(a, b)
    names = [name for name, _ in plain.named_parameters()]
    gates = [len(seen[0]) - len(names) + i for i, name in enumerate(names) if name.endswith("gate.weight")]
    assert all(not torch.equal(seen[one][i], seen[two][i]) for i in gates for one, two in ((0, 1), (1, 2)))
    assert torch.equal(seen[1][0], seen[2][0])  # computing every query changes gradients, not values
    assert_half_replayed(passes, 3)


def test_other_shapes_and_evaluation_run_one_by_one(passes):
    model, plain = (made("none", "selected") for _ in range(2))
    model.capture(2, 200)
    short = {k: v[:, :64] if torch.is_tensor(v) and v.dim() == 2 else v for k, v in batch(1).items()}
    losses = [m(**short).loss for m in (model, plain)]
    losses[0].backward()
    assert torch.equal(*losses)
    for m in (model, plain):
        m.eval()
    with torch.no_grad():
        assert torch.equal(model(batch(1)["tokens"]).logits, plain(batch(1)["tokens"]).logits)
    assert passes.replayed == [] and passes.launches == 0


def test_moved_parameters_are_noticed(passes):
    model = made("none", "selected")
    model.capture(2, 200)
    model.layers[0].norm.weight.data = model.layers[0].norm.weight.data.clone()
    with pytest.warns(UserWarning, match="parameters moved"):
        model(**batch(1)).loss.backward()
    assert passes.replayed == [] and passes.one_by_one == [(2, 200)]
