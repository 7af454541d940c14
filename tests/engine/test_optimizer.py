"""Whose AdamW kernel runs, and that each gives torch's AdamW."""

import sys
import types
from types import SimpleNamespace

import pytest
import torch

from megatron_taipan.engine.optimizer import KernelAdamW, describe_optimizer, loss_scale, make_optimizer
from megatron_taipan.errors import UserError
from megatron_taipan.optim_config import OptimConfig

OPTIM = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def adamw(lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay):
    """AdamW as in arXiv 1711.05101, algorithm 2, over lists of gradients, tensors and moments."""
    assert mode == 1 and bias_correction == 1
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g * g, alpha=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        p.sub_(lr * (update + weight_decay * p))


@pytest.fixture
def nvidia_apex(monkeypatch):
    """Modules with the names of NVIDIA's apex, the kernel in Python."""
    extension, apex, applier = (types.ModuleType(n) for n in ("amp_C", "apex", "apex.multi_tensor_apply"))
    extension.multi_tensor_adam = "the kernel"

    class Apply:
        available = True

        def __call__(self, kernel, overflow, lists, *numbers):
            assert kernel == "the kernel" and overflow.dtype == torch.int32
            adamw(lists, *numbers)

    applier.multi_tensor_applier = Apply()
    for name, module in {"amp_C": extension, "apex": apex, "apex.multi_tensor_apply": applier}.items():
        monkeypatch.setitem(sys.modules, name, module)


def groups(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).to(device).requires_grad_() for n in (1000, 37, 5)]
    return tensors, [{"params": tensors[:2], "weight_decay": 0.1}, {"params": tensors[2:], "weight_decay": 0.0}]


def follow(kernel: str, steps: int = 6, device="cpu") -> list[torch.Tensor]:
    """The tensors after steps on the same gradients; the second has none in step 2."""
    tensors, parts = groups(device)
    optimizer = make_optimizer(parts, OptimConfig(kernel=kernel, **OPTIM), on_gpu=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p in tensors:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        if step == 2:
            tensors[1].grad = None
        optimizer.step()
    return [t.detach().cpu() for t in tensors]


def test_apex_is_taken_where_it_is_and_gives_torchs_steps(nvidia_apex):
    optimizer = make_optimizer(groups()[1], OptimConfig(**OPTIM), on_gpu=True)
    assert describe_optimizer(optimizer) == "AdamW: NVIDIA apex's kernel"
    for ours, theirs in zip(follow("auto"), follow("torch"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_counter_lies_beside_the_moments_as_torch_has_it(nvidia_apex):
    tensors, parts = groups()
    optimizer = make_optimizer(parts, OptimConfig(kernel="apex", **OPTIM), on_gpu=True)
    for p in tensors:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())
    assert {key for state in optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.state[tensors[0]]["step"].fill_(7)  # as a checkpoint sets it
    optimizer.step()
    assert int(optimizer.state[tensors[0]]["step"]) == 8


def test_the_other_apex_fools_nobody(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # PyPI's: no amp_C beside it
    optimizer = make_optimizer(groups()[1], OptimConfig(**OPTIM), on_gpu=True)
    assert describe_optimizer(optimizer) == "AdamW: torch's fused kernel" and not isinstance(optimizer, KernelAdamW)
    with pytest.raises(UserError, match="NVIDIA's apex"):
        make_optimizer(groups()[1], OptimConfig(kernel="apex", **OPTIM), on_gpu=True)


def test_without_a_gpu_torchs_runs(nvidia_apex):
    assert isinstance(make_optimizer(groups()[1], OptimConfig(**OPTIM)), torch.optim.AdamW)
    with pytest.raises(UserError, match="on a GPU"):
        make_optimizer(groups()[1], OptimConfig(kernel="deepspeed", **OPTIM))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["deepspeed", "apex"])
def test_kernels_on_a_gpu_give_torchs_steps(kernel):
    if kernel == "apex":
        pytest.importorskip("amp_C")
    else:
        from deepspeed.git_version_info import installed_ops

        if not installed_ops.get("fused_adam"):
            pytest.skip("DeepSpeed's FusedAdam is not built here; compiling it takes minutes")
    exact = follow("torch")  # on the CPU
    for device_kernel in (kernel, "torch"):
        for ours, theirs in zip(follow(device_kernel, device="cuda"), exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_the_loss_scale_is_fp16s_alone():
    def engine(**scaler):
        return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=SimpleNamespace(**scaler)))

    assert loss_scale(engine(dynamic=True, cur_scale=1024)) == 1024.0
    assert loss_scale(engine(dynamic=False, cur_scale=1.0)) is None
    assert loss_scale(SimpleNamespace(optimizer=None)) is None
