"""Averaged gradients against sums in float64, and against DeepSpeed's own way: borders, padding, missing gradients."""

import time
from unittest import mock

import torch
from torch import Tensor, nn

from megatron_taipan.engine import reduction
from megatron_taipan.engine import zero as train_zero
from tests.distributed.launch import launch
from tests.train.toy import Ones, toy_config

STEPS, MICRO, RANKS = 5, 4, 2
# Elements; slices of two ranks end within b and within d, and each group but the last has padding at its end.
SHAPES = {"a": (7, 5), "b": (41,), "c": (3, 3), "d": (13,), "e": (2,), "f": (6, 4)}
LOW = {"a", "b", "c"}  # bf16; the others are float32 parameters
DECAYED = {"a", "b", "c", "f"}


class Linear(Ones):
    """A loss that is linear in every parameter, so that its gradients are what the caller wants."""

    def __init__(self):
        super().__init__(SHAPES, LOW)

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return sum((p.float() * wanted[name]).sum() for name, p in self.named_parameters() if name in wanted)


def wanted(step: int, rank: int, micro: int) -> dict[str, Tensor]:
    """Gradients, exact in bf16. Step 1: c has none on rank 1. Step 2: a and d have none in the last micro-batch.

    Step 3: e has none anywhere. They must not be what the steps before left in the same memory.
    """
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    every = {n: torch.randn(shape, generator=generator).bfloat16().float() for n, shape in SHAPES.items()}
    missing = set()
    if step == 1 and rank == 1:
        missing = {"c"}
    elif step == 2 and micro == MICRO - 1:
        missing = {"a", "d"}
    elif step == 3:
        missing = {"e"}
    return {name: value for name, value in every.items() if name not in missing}


def truth(step: int) -> dict[str, Tensor]:
    """Mean over ranks and micro-batches, float64."""
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for rank in range(RANKS):
        for micro in range(MICRO):
            for name, value in wanted(step, rank, micro).items():
                total[name] += value.double() / (RANKS * MICRO)
    return total


def reduced(ours: bool, small: int, steps: list[int]) -> dict:
    """Trains with buckets of 16 elements; what the optimizer found before each step, and when buckets started."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from megatron_taipan.engine.build import deepspeed_config
    from megatron_taipan.engine.mpu import ModelParallelUnit
    from megatron_taipan.engine.startup import import_deepspeed
    from megatron_taipan.engine.zero import patch_zero12
    from megatron_taipan.parallel.groups import build_groups
    from megatron_taipan.parallel.mesh import Mesh

    import_deepspeed(torch.device("cpu"))
    rank, groups = dist.get_rank(), build_groups(Mesh(data=RANKS))
    config = toy_config("unused", train={"precision": "bf16", "micro_batch": 1, "global_batch": RANKS * MICRO})
    model = Linear()
    kinds: dict[tuple, list] = {}
    for name, p in model.named_parameters():
        kinds.setdefault((name in LOW, name in DECAYED), []).append(p)
    optimizer = torch.optim.AdamW([{"params": params} for params in kinds.values()], lr=1e-2, fused=True)
    settings = deepspeed_config(config, groups, 100)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=ModelParallelUnit(groups))
    zero = engine.optimizer
    zero.check_grad_overflow = True
    partitions, full, started, copies = [], [], [], []
    if ours:
        with mock.patch.object(reduction, "BUCKET", 16), mock.patch.object(reduction, "SMALL", small):
            patch_zero12(zero)
        sums = zero.reduce_gradients.__self__
        hand_over = zero.reduce_gradients
        zero.reduce_gradients = lambda **options: (started.append(sums.reduction.started), hand_over(**options))
    step_of_zero = zero.step

    def watched_step() -> None:
        copies.append(any(p.grad_accum is not None or p.grad is not None for p in model.parameters()))
        copies.append(any(bucket.buffer for bucket in zero.ipg_buckets.values()))
        partitions.append([group.flat_partition.clone() for group in zero.averaged_gradients.values()])
        full.append({name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()})
        step_of_zero()

    zero.step = watched_step
    norms, before_last = [], 0
    for step in steps:
        for micro in range(MICRO):
            loss = engine(wanted(step, rank, micro))
            if ours and micro == MICRO - 1:
                before_last += sums.reduction.started
                time.sleep(0.3 * (rank == 1))  # whoever does not wait for this rank reads too early
            engine.backward(loss)
            assert not ours or not sums.waiting, "the next micro-batch's gradients may lie in the same memory"
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    result = {
        "partitions": partitions, "full": full, "norms": norms, "started": started, "before_last": before_last,
        "copies": any(copies), "masters": [m.detach().clone() for m in zero.single_partition_of_fp32_groups],
    }  # fmt: skip
    if ours:
        result["buckets"] = [(bucket.owner, bucket.values.numel()) for bucket in sums.reduction.buckets]
        result["second"] = second_gradient(model, sums)
    engine.destroy()
    return result


def second_gradient(model: nn.Module, sums) -> str:
    """What happens when a parameter gets another gradient after its sum was sent."""
    for p in reversed(list(model.parameters())):
        p.grad = torch.ones_like(p)
        sums.take(p, 0)
    model.b.grad = torch.ones_like(model.b)
    try:
        sums.take(model.b, 0)
    except RuntimeError as error:
        return str(error)
    finally:
        sums.hand_over()
    return "nothing"


def all_ways() -> dict[str, dict]:
    steps = list(range(STEPS))
    with mock.patch.object(train_zero, "TOGETHER", 1):
        one_by_one = reduced(True, 0, steps)
    with mock.patch.object(train_zero, "TOGETHER", 60):  # f to b, then a
        some_at_once = reduced(True, 2**22, steps)
    # DeepSpeed's own way needs every gradient on every rank
    few = {"ours": reduced(True, 0, [0, 4]), "theirs": reduced(False, 0, [0, 4])}
    return {"to owners": one_by_one, "to all": some_at_once, **few}


def test_gradients_are_averages_wherever_they_came_from():
    ranks = launch(RANKS, all_ways)
    for rank, ways in enumerate(ranks):
        for name in ("to owners", "to all"):
            for step, grads in enumerate(ways[name]["full"]):
                square = 0.0
                for parameter, exact in truth(step).items():
                    torch.testing.assert_close(
                        grads[parameter].double().view(exact.shape), exact, rtol=1e-6, atol=1e-7,
                        msg=lambda m, at=(rank, name, step, parameter): f"{at}: {m}",
                    )  # fmt: skip
                    square += float(exact.square().sum())
                torch.testing.assert_close(ways[name]["norms"][step], square**0.5, rtol=1e-6, atol=0)
        assert all(owner is None for owner, _ in ways["to all"]["buckets"])
        assert {owner for owner, _ in ways["to owners"]["buckets"]} == {0, 1}
        # nothing before the last micro-batch; then in the backward pass all that does not wait for others, unless a
        # gradient is missing
        complete, started = len(ways["to owners"]["buckets"]), ways["to owners"]["started"]
        assert started[0] == started[4] == complete
        assert all(count < complete for count in started[2:4])
        assert (started[1] < complete) == (rank == 1)
        assert all(0 < ways["to all"]["started"][step] < len(ways["to all"]["buckets"]) for step in (0, 4))
        for name in ("to owners", "to all"):
            assert ways[name]["before_last"] == 0
            assert max(size for _, size in ways[name]["buckets"]) == 16
            assert "parameter b got another gradient" in ways[name]["second"]
            assert not ways[name]["copies"], "DeepSpeed keeps gradients or buckets besides"
        # DeepSpeed's own way: the same partitions, padding included, and the same weights
        ours, theirs = ways["ours"], ways["theirs"]
        for key in ("partitions", "norms", "masters"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-7)
        for parameter, grad in theirs["full"][0].items():
            torch.testing.assert_close(ours["full"][0][parameter], grad, rtol=1e-6, atol=1e-7)
