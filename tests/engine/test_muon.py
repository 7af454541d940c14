"""Muon's arithmetic against torch's and against a singular value decomposition; skipped and scaled steps; refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_taipan.config_errors import ConfigError
from megatron_taipan.config_loading import make_config
from megatron_taipan.engine.matrices import MatrixExchange, share_out
from megatron_taipan.engine.muon import MuonAdamW, describe_muon
from megatron_taipan.engine.newton_schulz import newton_schulz, orthogonalise, update_scale
from megatron_taipan.engine.state_shards import StateShard, fill_in_moments
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.param_spec import ParamSpec
from megatron_taipan.parameters import parameter_table
from tests.engine.exact_muon import is_projection, orthogonal
from tests.train.toy import toy_tree

SHAPES = {"wide": (12, 40), "tall": (40, 12), "square": (24, 24), "also wide": (12, 40), "row": (1, 9)}
OPTIM = OptimConfig(name="muon", lr=1e-2, weight_decay=0.1, eps=1e-6)
STEPS = 4


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made_optimizer(
    dtype: torch.dtype, optim: OptimConfig = OPTIM, device: str = "cpu"
) -> tuple[dict[str, Tensor], MuonAdamW]:
    """Muon over the matrices of SHAPES, end to end in one tensor as ZeRO has them, padded; AdamW over a vector."""
    values = {name: draw(shape, seed).to(device) for seed, (name, shape) in enumerate(SHAPES.items())}
    flat = torch.nn.Parameter(torch.cat([*(v.flatten() for v in values.values()), torch.zeros(3, device=device)]))
    vector = torch.nn.Parameter(draw((7,), 9).to(device))
    groups: list[dict[str, Any]] = [
        {"params": [flat], "weight_decay": optim.weight_decay, "muon": True},
        {"params": [vector], "weight_decay": 0.0, "muon": False},
    ]
    optimizer = MuonAdamW(groups, optim)
    shards, offset, views = [], 0, {}
    for name, value in values.items():
        shards.append(StateShard(name, 0, value.numel(), flat, offset, optimizer, False))
        views[name] = flat.detach()[offset : offset + value.numel()].view(value.shape)
        offset += value.numel()
    of_vector = StateShard("vector", 0, 7, vector, 0, optimizer, False)
    fill_in_moments([*shards, of_vector])
    assert shards[0].kinds == ("master", "exp_avg") and of_vector.kinds == ("master", "exp_avg", "exp_avg_sq")
    optimizer.param_groups[0]["exchange"] = MatrixExchange(
        shards, {name: ParamSpec(shape, "normal") for name, shape in SHAPES.items()}, optim, tensor_rank=0,
        tensor_size=1, group=None, dtype=dtype, device=torch.device(device),
    )  # fmt: skip
    return views | {"vector": vector.detach(), "flat": flat}, optimizer


def give_gradients(optimizer: MuonAdamW, step: int, factor: float = 1.0) -> None:
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            p.grad = draw(p.shape, 100 + 10 * step + number).to(p.device) * factor
    optimizer.param_groups[0]["params"][0].grad[-3:] = 0  # padding


def stepped(optimizer: MuonAdamW) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_iteration_is_its_polynomial_of_the_singular_values(shape):
    matrices = torch.stack([draw(shape, 1), 1e-3 * draw(shape, 2)])
    for matrix, found in zip(matrices, newton_schulz(matrices, 5), strict=True):
        torch.testing.assert_close(found.double(), orthogonal(matrix), rtol=0, atol=2e-5)
        s = torch.linalg.svdvals(found)
        assert 0.6 < s.min() and s.max() < 1.3
    assert torch.equal(newton_schulz(torch.zeros(1, *shape), 5), torch.zeros(1, *shape))


def test_matrices_of_one_shape_go_together_in_parts(monkeypatch):
    monkeypatch.setattr("megatron_taipan.engine.newton_schulz.TOGETHER", 2 * 12 * 40)
    matrices = [draw(shape, seed) for seed, shape in enumerate([(12, 40)] * 5 + [(40, 12)] * 2)]
    for matrix, found in zip(matrices, orthogonalise(matrices, 5), strict=True):
        torch.testing.assert_close(found.double(), orthogonal(matrix), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", ["rms", "shape"])
def test_a_few_steps_are_those_of_torchs_muon_and_adamw(scale):
    optim = OPTIM.model_copy(update={"muon_scale": scale})
    views, optimizer = made_optimizer(torch.bfloat16, optim)
    theirs = {name: torch.nn.Parameter(views[name].clone()) for name in SHAPES}
    vector = torch.nn.Parameter(views["vector"].clone())
    muon = torch.optim.Muon(
        theirs.values(), lr=optim.lr, weight_decay=optim.weight_decay, momentum=0.95, nesterov=True,
        adjust_lr_fn={"rms": "match_rms_adamw", "shape": "original"}[scale],
    )  # fmt: skip
    adamw = torch.optim.AdamW([vector], lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    for step in range(STEPS):
        give_gradients(optimizer, step)
        offset = 0
        for p in theirs.values():
            p.grad = views["flat"].grad[offset : offset + p.numel()].view(p.shape).clone()
            offset += p.numel()
        vector.grad = optimizer.param_groups[1]["params"][0].grad.clone()
        muon.step()
        adamw.step()
        optimizer.step()
    for name, p in theirs.items():
        # 1e-7 apart here; another CPU may round products of many matrices in 16 bits otherwise than of one
        torch.testing.assert_close(views[name], p.detach(), rtol=0, atol=0.02 * STEPS * optim.lr)
        torch.testing.assert_close(views[name].norm(), p.detach().norm(), rtol=2e-4, atol=0)
    torch.testing.assert_close(views["vector"], vector.detach())
    assert torch.equal(views["flat"].detach()[-3:], torch.zeros(3))


def test_scales():
    assert update_scale((64, 256), "rms") == update_scale((256, 64), "rms") == pytest.approx(0.2 * 16)
    assert update_scale((256, 64), "shape") == 2 and update_scale((64, 256), "shape") == 1


class Reads(TorchDispatchMode):
    """Refuses to take a number out of a tensor, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_device_skips_and_scales_without_being_waited_for():
    """As zero.py lets it: the factor of clipping in grad_scale, found_inf where the norm is not finite."""
    plain_views, plain = made_optimizer(torch.float32)
    views, optimizer = made_optimizer(torch.float32)
    for step in range(STEPS):
        skipped = step in (0, 2)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(skipped))
        give_gradients(optimizer, step, 4.0)
        if skipped:
            optimizer.param_groups[0]["params"][0].grad[5] = float("nan")
            optimizer.param_groups[0]["params"][0].grad[50] = float("inf")
        else:
            give_gradients(plain, step)
            plain.step()
        groups, optimizer_groups = list(optimizer.param_groups), optimizer.param_groups
        with Reads():
            for group in groups:  # one at a time, as DeepSpeed steps them
                optimizer.param_groups = [group]
                optimizer.step()
        optimizer.param_groups = optimizer_groups
        for name, view in views.items():
            assert torch.equal(view, plain_views[name]), (step, name)
    for p, q in zip(stepped(optimizer), stepped(plain), strict=True):
        assert int(optimizer.state[p]["step"]) == STEPS - 2
        for key, value in plain.state[q].items():
            assert torch.equal(optimizer.state[p][key], value), key


def test_owners_have_about_the_same_work():
    works = {f"m{i}": size for i, size in enumerate([7, 7, 6, 5, 4, 3, 2, 1, 1])}
    owners = share_out(works, 3)
    loads = [sum(works[name] for name, owner in owners.items() if owner == rank) for rank in range(3)]
    assert sum(loads) == 36 and max(loads) <= 13
    assert share_out(dict(reversed(works.items())), 3) == owners  # the same on every rank
    assert share_out({}, 2) == {}


def test_the_table_says_what_is_a_matrix():
    for pattern in ("M S W A", "M"):
        config = make_config(toy_tree("no", "no", model={"pattern": pattern, "tie_embeddings": False}))
        table = parameter_table(config.model)
        assert {name for name, spec in table.items() if spec.is_matrix} == set(filter(is_projection, table))
    assert describe_muon(OptimConfig(), table) == []
    assert describe_muon(OptimConfig(name="muon"), table)[0].startswith("Muon: 6 matrices with ")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"zero_stage": 3}}, "zero_stage=3, which steps slices"),
        ({"parallel": {"offload_optimizer": "cpu"}}, "offload_optimizer=cpu: its matrix products"),
        ({"optim": {"kernel": "apex"}}, "kernel=apex with name=muon"),
        ({"optim": {"muon_momentum": 1.0}}, "muon_momentum"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(sections, message):
    with pytest.raises(ConfigError, match=message):
        make_config(toy_tree("no", "no", **sections | {"optim": {"name": "muon"} | sections.get("optim", {})}))
