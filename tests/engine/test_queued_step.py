"""The step that reads the norm behind AdamW, against DeepSpeed's own that reads it before, and against plain torch."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_taipan.layer_kinds.metrics import LayerMetrics
from megatron_taipan.model.taipan import TaipanOutput
from tests.distributed.launch import launch
from tests.model.small import small_config
from tests.train.toy import Ones, toy_config

STEPS, MICRO, CLIP = 6, 2, 2.0
SHAPES = {"a": (7, 5), "b": (41,), "d": (13,), "e": (3, 5)}
LOW = {"a", "b"}  # bf16; the others are float32 parameters
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
# steps (from 0) whose gradient is not finite: in one micro-batch, of the last rank only
BAD = {"none": (), "first": (0,), "middle": (2,), "twice": (2, 3), "first two and last": (0, 1, 5)}
WEIGHT_DECAY = 0.1


class Linear(Ones):
    """A loss that is linear in every parameter, so that its gradients are the tokens."""

    def __init__(self):
        super().__init__(SHAPES, LOW)
        self.layer_metrics = LayerMetrics(small_config("S"))

    def forward(self, tokens: Tensor, *, ce_scale: Tensor, **_: Any) -> TaipanOutput:
        wanted = tokens.split([p.numel() for p in self.parameters()])
        loss = sum((p.float() * w.view(p.shape)).sum() for p, w in zip(self.parameters(), wanted, strict=True))
        loss = loss * ce_scale  # 1: a batch has a token for each micro-batch and rank
        return TaipanOutput(loss=loss, ce_loss=loss / 2, budget_loss=loss / 4, metrics=loss.detach().expand(5) / 3)


def gradient(bad: tuple[int, ...], step: int, micro: int, rank: int, ranks: int) -> Tensor:
    """One micro-batch's, exact in bf16; small at step 4, so that nothing is clipped there."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    wanted = torch.randn(SIZE, generator=generator).bfloat16().float() * (2**-6 if step == 4 else 1)
    if step in bad and micro == 0 and rank == ranks - 1:
        wanted[5] = math.inf if step % 2 else math.nan
    return wanted


class Reads(TorchDispatchMode):
    """Notes every number that Python takes out of a tensor."""

    def __init__(self, log: list[str]):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.log.append("number")
        return func(*args, **(kwargs or {}))


def trained(device: str, bad: tuple[int, ...], *, queued: bool, around: Any = nullcontext) -> dict[str, Any]:
    """A few steps; after each, what train_step gave, DeepSpeed's counters, and a copy of this rank's whole state.

    Args:
        queued: whether the norm is read behind AdamW, else before.
        around: entered for each call of train_step but the first.
    """
    import deepspeed
    import torch.distributed as dist

    from megatron_taipan.engine import zero
    from megatron_taipan.engine.build import deepspeed_config, set_learning_rate
    from megatron_taipan.engine.mpu import ModelParallelUnit
    from megatron_taipan.engine.readback import Readback
    from megatron_taipan.engine.startup import import_deepspeed
    from megatron_taipan.engine.state_shards import KINDS, held_shards, optimizer_step
    from megatron_taipan.parallel.groups import build_groups
    from megatron_taipan.parallel.mesh import Mesh
    from megatron_taipan.train.step import train_step

    import_deepspeed(torch.device(device))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    groups = build_groups(Mesh(data=ranks))
    config = toy_config(
        "unused", train={"precision": "bf16", "micro_batch": 1, "global_batch": ranks * MICRO},
        optim={"grad_clip": CLIP},
    )  # fmt: skip
    model = Linear().to(device)
    named = dict(model.named_parameters())
    kinds = [[named[n] for n in SHAPES if (n in LOW) == low] for low in (True, False)]
    adamw = torch.optim.AdamW([{"params": k} for k in kinds], fused=True, weight_decay=WEIGHT_DECAY)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw, config=deepspeed_config(config, groups, SIZE), mpu=ModelParallelUnit(groups)
    )
    engine.optimizer.check_grad_overflow = True
    with nullcontext() if queued else mock.patch.object(zero, "QueuedStep", lambda optimizer: None):
        zero.patch_zero12(engine.optimizer)

    log: list[str] = []
    noted = partial(noting, log)
    steps = []
    for step in range(STEPS):
        set_learning_rate(engine, 1e-2 / (step + 1))
        batches = [
            {
                "tokens": gradient(bad, step, micro, rank, ranks).to(device), "loss_mask": torch.ones(1, device=device),
                "labels": None, "seq_idx": None, "sample": None,
            }
            for micro in range(MICRO)
        ]  # fmt: skip
        log.clear()
        with (
            mock.patch.object(adamw, "step", noted("AdamW", adamw.step)),
            mock.patch.object(Readback, "__init__", noted("sent", Readback.__init__)),
            mock.patch.object(Readback, "read", noted("read", Readback.read)),
            mock.patch.object(Tensor, "tolist", noted("number", Tensor.tolist)),
            Reads(log),
            around() if step else nullcontext(),
        ):
            result = train_step(
                engine, batches, step=step, groups=groups, grad_clip=CLIP, requests=[step == 1 and rank == 0, False]
            )
        pieces = held_shards(engine, groups.zero_rank)
        steps.append({
            "result": result, "log": list(log),
            "counters": (engine.global_steps, engine.micro_steps, engine.skipped_steps, engine.was_step_applied(),
                         bool(engine.optimizer.overflow), float(engine.get_global_grad_norm()),
                         [group["lr"] for group in engine.optimizer.param_groups]),
            "count": optimizer_step(pieces),
            "weights": {name: p.detach().cpu().clone() for name, p in named.items()},
            "state": {(p.name, p.start, kind): p.tensor(kind).cpu().clone() for p in pieces for kind in KINDS},
        })  # fmt: skip
    engine.destroy()
    return {"steps": steps, "queued": not engine.optimizer.check_grad_overflow}


def noting(log: list[str], what: str, call: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        log.append(what)
        return call(*args, **kwargs)

    return run


def both_ways(device: str = "cpu") -> dict[str, tuple[dict, dict]]:
    return {name: (trained(device, bad, queued=True), trained(device, bad, queued=False)) for name, bad in BAD.items()}


def plain(bad: tuple[int, ...], ranks: int) -> list[dict[str, Tensor]]:
    """The masters after each step by torch alone: clip_grad_norm_, AdamW in float64, a step left out if need be."""
    masters = {name: nn.Parameter(torch.ones(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    adamw = torch.optim.AdamW(masters.values(), fused=False, weight_decay=WEIGHT_DECAY)
    after = []
    for step in range(STEPS):
        parts = [gradient(bad, step, m, r, ranks).double() for m in range(MICRO) for r in range(ranks)]
        mean = torch.stack(parts).mean(0).split([p.numel() for p in masters.values()])
        for p, grad in zip(masters.values(), mean, strict=True):
            p.grad = grad.view(p.shape)
        adamw.param_groups[0]["lr"] = 1e-2 / (step + 1)
        if torch.nn.utils.clip_grad_norm_(masters.values(), CLIP).isfinite():
            adamw.step()
        after.append({name: p.detach().clone() for name, p in masters.items()})
    return after


def check(results: list[dict[str, tuple[dict, dict]]]) -> None:
    """Of every rank: bit for bit as with the norm read first, and as torch alone would have it."""
    for name, bad in BAD.items():
        exact = plain(bad, len(results))
        for rank, ways in enumerate(results):
            ours, first = ways[name]
            assert ours["queued"] and not first["queued"]
            for step, (now, then) in enumerate(zip(ours["steps"], first["steps"], strict=True)):
                where = f"{name}, step {step}, rank {rank}"
                assert repr(now["result"]) == repr(then["result"]), where  # nan is nan
                assert now["counters"] == then["counters"], where
                for key in ("weights", "state"):
                    assert now[key].keys() == then[key].keys()
                    for part, values in now[key].items():
                        assert torch.equal(values, then[key][part]), (where, key, part)
                # and what it should be, whatever both did
                good = step + 1 - sum(b <= step for b in bad)
                assert now["result"].skipped == (step in bad) and now["count"] == then["count"] == good, where
                assert math.isinf(now["result"].grad_norm) == (step in bad), where
                assert now["result"].requests == [step == 1, False]
                assert step in bad or (now["result"].grad_norm > CLIP) == (step != 4), where
                for parameter, weights in now["weights"].items():
                    close = {"rtol": 2**-8, "atol": 0.0} if parameter in LOW else {"rtol": 1e-5, "atol": 1e-6}
                    torch.testing.assert_close(weights.double(), exact[step][parameter], **close, msg=where)
                for (parameter, start, kind), values in now["state"].items():
                    if kind == "master":
                        wanted = exact[step][parameter].view(-1)[start : start + len(values)]
                        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-6, msg=where)
                # nothing is read before the last launch of AdamW; DeepSpeed's way shows that a reading is seen
                order = [what for what in now["log"] if what != "number"]
                assert order == ["sent", "sent", "AdamW", "AdamW", "read", "read"], (where, now["log"])
                assert "number" not in now["log"][:4], (where, now["log"])
                assert now["log"].count("number") == 3, (where, now["log"])  # of what was read: norm, means, flags
                launched = 0 if step in bad else 2
                assert then["log"][:2] == ["sent", "number"] and then["log"].count("AdamW") == launched, (
                    where,
                    then["log"],
                )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_reads_late_is_the_step_that_reads_first_bit_for_bit(ranks):
    check(launch(ranks, both_ways))


def paths_taken() -> dict[str, bool]:
    """Whether the norm is read late, by stage, precision and optimizer."""
    from megatron_taipan.engine import build as engines
    from megatron_taipan.model.taipan import Taipan
    from megatron_taipan.parallel.groups import build_groups
    from megatron_taipan.parallel.mesh import Mesh

    groups = build_groups(Mesh(data=2))
    cases = {f"{p} stage {s}": (p, s, True) for p, s in (("bf16", 1), ("fp32", 1), ("bf16", 2))}
    taken = {}
    for name, (precision, stage, fused) in (cases | {"bf16 unfused": ("bf16", 1, False)}).items():
        config = toy_config("unused", train={"precision": precision}, parallel={"zero_stage": stage})
        make = partial(torch.optim.AdamW, fused=fused)
        with mock.patch.object(engines, "make_optimizer", lambda params, optim, on_gpu, make=make: make(params)):
            engine = engines.build_engine(Taipan(config.model, seed=3), config, groups, torch.device("cpu"))
        taken[name] = not engine.optimizer.check_grad_overflow
        engine.destroy()
    return taken


def test_only_fused_adamw_over_bf16_weights_at_stage_1_reads_late():
    for taken in launch(2, paths_taken):
        assert taken == {"bf16 stage 1": True, "fp32 stage 1": False, "bf16 stage 2": False, "bf16 unfused": False}
