"""Training on a GPU in every precision: float32 parameters, the loss scaler, the same losses; and no waiting for it."""

import os

import pytest
import torch

from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parameters import parameter_table
from tests.distributed.launch import launch
from tests.train.toy import toy_config, write_data

pytestmark = pytest.mark.gpu
# the kernels' sizes: powers of two from 16 on
SIZES = {
    "pattern": "M S M W", "vocab_size": 64, "d_model": 64, "d_ff": 128,
    "mamba": {"d_state": 16, "headdim": 16}, "attention": {"n_heads": 4, "window": 48},
}  # fmt: skip
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


def trained_on_gpu(prefix: str, cases: dict[str, dict]) -> dict[str, dict]:
    """A few steps of each case in this process, the first in fp32; losses, norms, loss scale, types of the parameters,
    and the losses in fp32 without the steps that the case skipped."""
    from megatron_taipan.data.loader import build_dataset, make_loader
    from megatron_taipan.engine.build import build_engine, set_learning_rate
    from megatron_taipan.engine.optimizer import loss_scale
    from megatron_taipan.parallel.groups import build_groups
    from megatron_taipan.parallel.mesh import Mesh
    from megatron_taipan.parallel.processes import device_of_process, find_place
    from megatron_taipan.train.distributed import start_processes
    from megatron_taipan.train.loop import to_device
    from megatron_taipan.train.start import settle_numerics
    from megatron_taipan.train.step import train_step

    place = find_place(os.environ)
    device = device_of_process(place)
    start_processes(place, device, 120)
    groups = build_groups(Mesh())

    def run(precision: str, stage: int, tf32: bool, left_out: tuple[int, ...] = ()) -> dict:
        config = toy_config(
            prefix, model=SIZES, data={"train": prefix, "seq_len": 128}, parallel={"zero_stage": stage},
            train={"precision": precision, "tf32": tf32, "micro_batch": 8, "global_batch": 8},
        )  # fmt: skip
        settle_numerics(config)
        engine = build_engine(Taipan(config.model, seed=3), config, groups, device)
        data = build_dataset(config.data, "train", config.model.vocab_size)
        loader = make_loader(data, start=0, global_batch=8, micro_batch=8, dp_rank=0, dp_size=1)
        steps = []
        for step in range(12):
            set_learning_rate(engine, 3e-3)
            batch = to_device(next(loader), device)
            if step not in left_out:
                steps.append(train_step(engine, [batch], step=step, groups=groups, grad_clip=1.0))
        result = {
            "ce": [s.ce for s in steps], "norm": [s.grad_norm for s in steps], "skipped": [s.skipped for s in steps],
            "loss_scale": loss_scale(engine), "dtypes": {n: p.dtype for n, p in engine.module.named_parameters()},
            "buffers": {n: b.dtype for n, b in engine.module.named_buffers()},
        }  # fmt: skip
        engine.destroy()
        return result

    results = {}
    for name, case in cases.items():
        results[name] = run(case["precision"], case["stage"], name == "tf32")
        skipped = tuple(step for step, was in enumerate(results[name]["skipped"]) if was)
        results[name]["fp32"] = run("fp32", 1, False, skipped)["ce"] if skipped else results["fp32"]["ce"]
    return results


def test_every_precision_keeps_the_islands_and_learns_the_same(tmp_path):
    prefix = write_data(tmp_path / "data", documents=400)
    cases = {"fp32": {"precision": "fp32", "stage": 1}, "tf32": {"precision": "fp32", "stage": 1}}
    cases |= {f"{p} stage {s}": {"precision": p, "stage": s} for p in ("bf16", "fp16") for s in (1, 2, 3)}
    results = launch(1, trained_on_gpu, prefix, cases, on_gpu=True, join=False, timeout=280)[0]
    fp32_params = {n for n, spec in parameter_table(toy_config("x", model=SIZES).model).items() if spec.float32}
    full = results["fp32"]["ce"]
    assert full[-1] < 0.9 * full[0], "nothing was learned"
    for name, result in results.items():
        low = LOW[name.split()[0]]
        for parameter, dtype in result["dtypes"].items():
            assert dtype == (torch.float32 if parameter in fp32_params else low), (name, parameter)
        assert all(dtype == torch.float32 for dtype in result["buffers"].values()), name
        assert (result["loss_scale"] is not None) == name.startswith("fp16"), name
        taken = [ce for ce, skipped in zip(result["ce"], result["skipped"], strict=True) if not skipped]
        assert len(taken) >= 9, (name, result["skipped"])  # fp16 may find its scale first
        assert taken == pytest.approx(result["fp32"], rel=0.02), name
    assert results["tf32"]["ce"] != full, "train.tf32 changed no bit"


def test_forward_and_backward_never_wait_for_the_gpu():
    config = toy_config("x", model=SIZES).model
    model = Taipan(config, seed=1).cuda().bfloat16().train()
    tokens = torch.randint(0, 64, (4, 257), device="cuda")
    seq_idx = (torch.arange(256, device="cuda") > 100).int().expand(4, 256).contiguous()
    samples, scale = torch.arange(4, device="cuda"), torch.tensor(1e-3, device="cuda")

    def once(step: int) -> torch.Tensor:
        out = model(
            tokens[:, :-1], labels=tokens[:, 1:], loss_mask=torch.ones(4, 256, device="cuda"), seq_idx=seq_idx,
            samples=samples, step=step, ce_scale=scale,
        )  # fmt: skip
        out.loss.backward()
        return out.loss

    once(0)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = once(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def steps_without_waiting(prefix: str) -> dict[str, list[bool]]:
    """Whole training steps in the mode in which torch raises where the host would wait; skipped, with and without."""
    from contextlib import ExitStack

    from megatron_taipan.data.loader import build_dataset, make_loader
    from megatron_taipan.engine.build import build_engine, capture_graphs, set_learning_rate
    from megatron_taipan.parallel.groups import build_groups
    from megatron_taipan.parallel.mesh import Mesh
    from megatron_taipan.parallel.processes import device_of_process, find_place
    from megatron_taipan.train.distributed import start_processes
    from megatron_taipan.train.loop import to_device
    from megatron_taipan.train.step import train_step
    from tests.model.replays import watched_passes

    place = find_place(os.environ)
    device = device_of_process(place)
    start_processes(place, device, 120)
    groups = build_groups(Mesh())
    skipped = {}
    for graphs in (False, True):
        config = toy_config(
            prefix, model=SIZES, data={"train": prefix, "seq_len": 128},
            train={"precision": "bf16", "micro_batch": 8, "global_batch": 8, "cuda_graphs": graphs},
        )  # fmt: skip
        model = Taipan(config.model, seed=3)
        engine = build_engine(model, config, groups, device)
        with ExitStack() as stack:
            layers = capture_graphs(model, config, device, stack)
            assert layers.startswith("layers run as") == graphs, layers
            data = build_dataset(config.data, "train", config.model.vocab_size)
            loader = make_loader(data, start=0, global_batch=8, micro_batch=8, dp_rank=0, dp_size=1)
            batches = [to_device(next(loader), device) for _ in range(6)]
            batches[4]["loss_mask"] = batches[4]["loss_mask"] * float("inf")
            steps = []
            with watched_passes() as passes:
                for step, batch in enumerate(batches):
                    set_learning_rate(engine, 3e-3)
                    torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first ones compile
                    try:
                        result = train_step(
                            engine, [batch], step=step, groups=groups, grad_clip=1.0, requests=[step == 3, False]
                        )
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                    assert result.requests == [step == 3, False]
                    steps.append(result.skipped)
            assert [len(passes.replayed), len(passes.one_by_one)] == ([6, 0] if graphs else [0, 6]), passes
            assert (passes.launches > 0) == graphs
            skipped[layers] = steps
        engine.destroy()
    return skipped


def test_a_training_step_never_waits_but_for_its_own_numbers(tmp_path):
    prefix = write_data(tmp_path / "data", documents=400)
    found = launch(1, steps_without_waiting, prefix, on_gpu=True, join=False, timeout=280)[0]
    assert len(found) == 2
    for layers, skipped in found.items():
        assert skipped == [False, False, False, False, True, False], layers
