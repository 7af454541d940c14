"""What the tests of the GPU kernels share: float64 references, errors as norms, poisoned memory."""

from collections.abc import Callable

import torch
from torch import Tensor

# Relative errors of norms: a few roundings of the type; products round their operands, so float32 means "no TF32".
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|got - expected| / |expected| or, where that is smaller, / floor, in float64; nan where got holds one."""
    difference = (got.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(max(floor, 1e-30))).item()


def with_gradients(run: Callable, inputs: list[Tensor | None], upstream_seed: int = 3) -> list[Tensor]:
    """The output of run(*inputs), then the gradient of every input that is given."""
    leaves = [t.detach().clone().requires_grad_() if t is not None else None for t in inputs]
    out = run(*leaves)
    generator = torch.Generator(out.device).manual_seed(upstream_seed)
    grad = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


def poison(megabytes: int = 256) -> None:
    """Fills memory that the allocator will hand out next with NaN: an element that nobody wrote shows."""
    block = torch.full((megabytes << 18,), float("nan"), device="cuda")
    pieces = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(16)]
    del block, pieces


def assert_close(kernel: Callable, reference: Callable, inputs: list[Tensor | None], tolerance: float) -> None:
    """Output and gradients of the kernel against the reference on the same values in float64."""
    expected = with_gradients(reference, [t.double() if t is not None else None for t in inputs])
    poison()
    got = with_gradients(kernel, inputs)
    errors = [error(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(e < tolerance for e in errors), errors
