"""The DeepSpeed engine: float32 parameters, and losses that do not depend on how the batch is split."""

from functools import partial

import pytest
import torch
from torch import nn

from megatron_taipan.config import Config
from megatron_taipan.engine.build import check_layout, deepspeed_config, parameter_groups
from megatron_taipan.engine.protocol import Engine
from megatron_taipan.errors import UserError
from megatron_taipan.parameters import parameter_table
from tests.distributed.launch import launch
from tests.engine.test_protocol import unfulfilled
from tests.train.toy import toy_config, write_data

STEPS = 4


def trained(prefix: str, parallel: dict, train: dict) -> dict:
    """Trains a few steps in this process group; gives losses, norms, parameter types, and the float32 masters."""
    import torch.distributed as dist

    from megatron_taipan.data.loader import build_dataset, make_loader
    from megatron_taipan.engine.build import accumulation, build_engine, set_learning_rate
    from megatron_taipan.model.taipan import Taipan
    from megatron_taipan.parallel.groups import build_groups
    from megatron_taipan.parallel.mesh import Mesh
    from megatron_taipan.train.evaluate import evaluate
    from megatron_taipan.train.step import train_step

    config = toy_config(prefix, parallel=parallel, train={"micro_batch": 2, "global_batch": 8, **train})
    groups = build_groups(Mesh(data=dist.get_world_size()))
    model = Taipan(config.model, seed=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = build_engine(model, config, groups, torch.device("cpu"))
    assert isinstance(engine, Engine) and not unfulfilled(engine, Engine), unfulfilled(engine, Engine)
    at_start = masters(model, config)
    data = build_dataset(config.data, "train", config.model.vocab_size)
    valid = build_dataset(config.data, "valid", config.model.vocab_size)
    loader = make_loader(
        data, start=0, global_batch=config.train.global_batch, micro_batch=config.train.micro_batch,
        dp_rank=groups.data_rank, dp_size=groups.data_size,
    )  # fmt: skip
    # five samples: the last round is not full where it has two rows or more
    evaluation = partial(
        evaluate, engine, valid, samples=5, micro_batch=config.train.micro_batch, groups=groups,
        device=torch.device("cpu"), gate=config.model.gate,
    )  # fmt: skip
    untrained = evaluation().layer_metrics
    results = []
    for step in range(STEPS):
        set_learning_rate(engine, 1e-2)
        batches = [next(loader) for _ in range(accumulation(config, groups.data_size))]
        results.append(train_step(engine, batches, step=step, groups=groups, grad_clip=config.optim.grad_clip))
    evaluated = evaluation()
    return {
        "ce": [r.ce for r in results],
        "norm": [r.grad_norm for r in results],
        "metrics": [r.layer_metrics for r in results],
        "valid": (evaluated.ce, evaluated.tokens),
        "metrics of the untrained": untrained,
        "dtypes": {name: p.dtype for name, p in model.named_parameters()},
        "masters": masters(model, config),
        "before": before,
        "at start": at_start,
    }


def masters(model: torch.nn.Module, config: Config) -> dict[str, torch.Tensor]:
    """The whole float32 parameters that the optimizer updates."""
    import deepspeed.utils

    return {
        name: (deepspeed.utils.safe_get_full_fp32_param(p) if config.parallel.zero_stage else p).detach().clone()
        for name, p in model.named_parameters()
    }


def all_cases(prefix: str, cases: dict[str, tuple[dict, dict]]) -> dict[str, dict]:
    return {name: trained(prefix, parallel, train) for name, (parallel, train) in cases.items()}


def test_islands_stay_float32_and_are_trained_as_in_float32(tmp_path):
    cases = {"fp32": ({"zero_stage": 1}, {"precision": "fp32"})}
    bf16 = {f"stage {s}": {"zero_stage": s} for s in (1, 2, 3)}
    bf16["stage 3, parameters offloaded"] = {"zero_stage": 3, "offload_param": "cpu"}
    cases |= {f"bf16 {name}": (parallel, {"precision": "bf16"}) for name, parallel in bf16.items()}
    results = launch(2, all_cases, write_data(tmp_path / "data"), cases)[0]
    config = toy_config("unused")
    fp32_params = {name for name, spec in parameter_table(config.model).items() if spec.float32}
    assert {name.rpartition(".")[2] for name in fp32_params} >= {"A_log", "dt_bias", "D"}
    assert any(".gate." in name for name in fp32_params)
    truth = results["fp32"]
    for stage in bf16:
        result = results[f"bf16 {stage}"]
        for name, dtype in result["dtypes"].items():
            assert dtype == (torch.float32 if name in fp32_params else torch.bfloat16), (stage, name)
        for name in fp32_params:
            start = truth["before"][name]
            assert torch.equal(result["at start"][name], start), (stage, name)
            wanted, moved = truth["masters"][name] - start, result["masters"][name] - start
            assert wanted.abs().max() > 1e-3, name  # it was trained at all
            # Adam's first steps follow the sign of the gradient, which bf16 noise turns here and there
            assert torch.dot(wanted.flatten(), moved.flatten()) > 0.9 * wanted.norm() * moved.norm(), (stage, name)
        # the three stages sum the same gradients in float32, so they agree far more closely than bf16 is exact
        for ours, other in zip(result["ce"], results["bf16 stage 1"]["ce"], strict=True):
            assert abs(ours - other) < 1e-3
        for ours, exact in zip(result["ce"], truth["ce"], strict=True):
            assert abs(ours - exact) < 0.03


def test_loss_does_not_depend_on_processes_micro_batches_or_stage(tmp_path):
    prefix = write_data(tmp_path / "data")
    alone = {
        "plain": ({"zero_stage": 0}, {}),
        "whole": ({"zero_stage": 1}, {"micro_batch": 8}),
        "single": ({"zero_stage": 1}, {"micro_batch": 1}),
    }
    pair = {f"stage {s}": ({"zero_stage": s}, {"micro_batch": m}) for s, m in ((0, 2), (1, 4), (2, 1), (3, 2))}
    results = launch(1, all_cases, prefix, alone)[0] | launch(2, all_cases, prefix, pair)[0]
    truth = results["plain"]
    for name, result in results.items():
        torch.testing.assert_close(result["ce"][0], truth["ce"][0], rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(result["ce"], truth["ce"], rtol=1e-4, atol=0, msg=name)
        torch.testing.assert_close(result["norm"], truth["norm"], rtol=1e-3, atol=0, msg=name)
        shares, expected = ([m["layers.1.selected"] for m in r["metrics"]] for r in (result, truth))
        assert shares == expected, name
        assert result["valid"][1] == truth["valid"][1]
        assert result["metrics of the untrained"] == pytest.approx(truth["metrics of the untrained"], rel=1e-6)
        torch.testing.assert_close(result["valid"][0], truth["valid"][0], rtol=1e-4, atol=0)


def test_biases_norms_and_decay_rates_take_no_weight_decay_and_types_are_never_mixed():
    config = toy_config("unused", train={"precision": "bf16"}, optim={"weight_decay": 0.1})
    table = parameter_table(config.model)
    model = fake_model(table)
    groups = parameter_groups(model, table, config)
    names = {id(p): name for name, p in named(model, table)}
    assert sum(len(g["params"]) for g in groups) == len(table)
    for group in groups:
        assert len({p.dtype for p in group["params"]}) == 1
        for parameter in group["params"]:
            name = names[id(parameter)]
            no_decay = name.endswith(("bias", "A_log", ".D", "norm.weight", "norm_weight"))
            assert group["weight_decay"] == (0.0 if no_decay else 0.1), name
    # see parameter_groups: DeepSpeed takes the first group's type for the type of all
    for stage, first in ((1, torch.bfloat16), (2, torch.float32)):
        config = toy_config("unused", train={"precision": "bf16"}, parallel={"zero_stage": stage})
        assert parameter_groups(model, table, config)[0]["params"][0].dtype == first


@pytest.mark.parametrize("what", ["offload_optimizer", "offload_param"])
def test_what_deepspeed_would_keep_out_of_a_checkpoints_reach_is_refused(what):
    """At the first save of `offload_optimizer=nvme` its tensors have no elements: they are in DeepSpeed's files."""
    for stage in (1, 2, 3):
        parallel = {"zero_stage": stage, what: "nvme", "nvme_path": "disk"}
        with pytest.raises(UserError, match=f"parallel.{what}=nvme: .*first save; use {what}=cpu"):
            check_layout(toy_config("unused", parallel=parallel), 1)
    check_layout(toy_config("unused", parallel={"zero_stage": 3, what: "cpu", "nvme_path": "disk"}), 1)


def test_a_parameter_that_the_table_does_not_know_is_an_error():
    config = toy_config("unused")
    model = nn.Module()
    model.surprise = nn.Parameter(torch.zeros(2))
    try:
        parameter_groups(model, parameter_table(config.model), config)
    except KeyError as error:
        assert "surprise" in str(error)
    else:
        raise AssertionError("an unknown parameter was accepted")


def test_deepspeed_reduces_in_float32_and_never_casts():
    config = toy_config("unused", train={"precision": "bf16"})
    from megatron_taipan.parallel.groups import Groups
    from megatron_taipan.parallel.mesh import Mesh
    from megatron_taipan.parallel.tensor import TensorParallel

    groups = Groups(Mesh(data=2), 0, TensorParallel(), None)
    settings = deepspeed_config(config, groups, 1000)
    assert "bf16" not in settings
    assert settings["communication_data_type"] == "fp32"
    assert settings["gradient_accumulation_steps"] == 8 // 2 // 2


def fake_model(table: dict) -> nn.Module:
    """Modules with the table's parameter names and types."""
    root = nn.Module()
    for name, spec in table.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = getattr(node, part)
        dtype = torch.float32 if spec.float32 else torch.bfloat16
        node.register_parameter(last, nn.Parameter(torch.zeros(spec.shape, dtype=dtype)))
    return root


def named(model: nn.Module, table: dict) -> list[tuple[str, nn.Parameter]]:
    parameters = dict(model.named_parameters())
    return [(name, parameters[name]) for name in table]
