"""fp16 the whole way, on the CPU: fp32_params, dynamic loss scale, a step that overflows, and what fp32 learns.

DeepSpeed and our own check refuse fp16 on a CPU because it is slow there; both are told otherwise here.
"""

import os
from contextlib import contextmanager
from unittest import mock

import torch

from megatron_taipan.parameters import parameter_table
from tests.distributed.launch import launch
from tests.train.toy import toy_config, write_data

STEPS = 8


@contextmanager
def fp16_on_a_cpu():
    from deepspeed.accelerator import get_accelerator

    from megatron_taipan.engine import build as engine

    cast = engine.cast

    def cast_anyway(model, precision, device):
        return model.half() if precision == "fp16" else cast(model, precision, device)

    accelerator = get_accelerator()
    with (
        mock.patch.object(engine, "cast", cast_anyway),
        mock.patch.object(accelerator, "is_fp16_supported", lambda: True),
    ):
        yield


def trained(prefix: str, cases: dict[str, tuple[str, int]]) -> dict[str, dict]:
    """Steps of each case (precision, ZeRO stage); in the third the loss scale is far too large."""
    from megatron_taipan.data.loader import build_dataset, make_loader
    from megatron_taipan.engine.build import build_engine, set_learning_rate
    from megatron_taipan.engine.optimizer import loss_scale
    from megatron_taipan.model.taipan import Taipan
    from megatron_taipan.parallel.groups import build_groups
    from megatron_taipan.parallel.mesh import Mesh
    from megatron_taipan.train.step import train_step

    assert os.environ["WORLD_SIZE"] == "1"
    groups, device, results = build_groups(Mesh()), torch.device("cpu"), {}
    for name, (precision, stage) in cases.items():
        config = toy_config(
            prefix, parallel={"zero_stage": stage},
            train={"precision": precision, "micro_batch": 8, "global_batch": 8},
        )  # fmt: skip
        with fp16_on_a_cpu():
            engine = build_engine(Taipan(config.model, seed=3), config, groups, device)
        data = build_dataset(config.data, "train", config.model.vocab_size)
        loader = make_loader(data, start=0, global_batch=8, micro_batch=8, dp_rank=0, dp_size=1)
        steps, scales, moved = [], [loss_scale(engine)], []
        for step in range(STEPS):
            set_learning_rate(engine, 3e-3)
            if step == 2 and precision == "fp16":
                engine.optimizer.loss_scaler.cur_scale = 2.0**40
            before = engine.module.final_norm.weight.detach().clone()
            steps.append(train_step(engine, [next(loader)], step=step, groups=groups, grad_clip=1.0))
            moved.append(not torch.equal(before, engine.module.final_norm.weight))
            if step == 2 and precision == "fp16":
                engine.optimizer.loss_scaler.cur_scale = 2.0**16
            scales.append(loss_scale(engine))
        results[name] = {
            "ce": [s.ce for s in steps], "norm": [s.grad_norm for s in steps], "skipped": [s.skipped for s in steps],
            "scales": scales, "moved": moved, "dtypes": {n: p.dtype for n, p in engine.module.named_parameters()},
        }  # fmt: skip
    return results


def test_fp16_learns_what_fp32_learns_and_skips_what_overflows(tmp_path):
    cases = {"fp32": ("fp32", 1)} | {f"fp16 stage {stage}": ("fp16", stage) for stage in (1, 2, 3)}
    results = launch(1, trained, write_data(tmp_path / "data"), cases)[0]
    fp32_params = {name for name, spec in parameter_table(toy_config("x").model).items() if spec.float32}
    full = results.pop("fp32")
    assert full["scales"] == [None] * (STEPS + 1) and not any(full["skipped"])
    for name, result in results.items():
        for parameter, dtype in result["dtypes"].items():
            assert dtype == (torch.float32 if parameter in fp32_params else torch.float16), (name, parameter)
        assert result["skipped"] == [step == 2 for step in range(STEPS)], name
        if not name.endswith("3"):  # there the module's own tensors are empty between steps
            assert result["moved"] == [step != 2 for step in range(STEPS)], name
        assert result["scales"][0] == 2.0**16 and result["scales"][-1] == 2.0**16
        for step in range(3):  # until the one that is skipped both have made the same updates
            assert abs(result["ce"][step] - full["ce"][step]) < 2e-3 * full["ce"][step], (name, step)
            if step < 2:
                assert abs(result["norm"][step] - full["norm"][step]) < 1e-2 * full["norm"][step], (name, step)
        assert result["ce"][-1] < 0.95 * result["ce"][0], name
