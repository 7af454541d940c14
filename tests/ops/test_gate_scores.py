"""The gate's kernel: logits against float64, noise against that of plain torch; on a GPU or with TRITON_INTERPRET=1."""

import pytest
import torch
import torch.nn.functional as F

from megatron_taipan.model.noise import gumbel_noise
from tests.ops.devices import DEVICES
from tests.ops.kernel_checks import TOLERANCE, error, poison

pytest.importorskip("triton")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "learns"), [((3, 50, 300), True), ((300, 64), True), ((1, 1, 33), False)])
def test_logits_and_gradients(device, dtype, shape, learns):
    from megatron_taipan.ops.gate_scores_triton import gate_scores

    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bf16 off where a GPU rounds")
    wide = torch.randn(*shape[:-1], shape[-1] + 8, device=device).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=device), torch.randn(2, device=device)
    leaves = [wide.requires_grad_(learns), weight.requires_grad_(), bias.requires_grad_()]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    upstream = torch.randn(*shape[:-1], 2, device=device)
    if device == "cuda":
        poison()
    found, noise = gate_scores(leaves[0][..., 5:-3], *leaves[1:])  # rows lie apart
    expected = F.linear(exact[0][..., 5:-3], *exact[1:])
    assert noise is None and found.dtype == torch.float32
    assert error(found, expected) < TOLERANCE[torch.float32]
    ours = torch.autograd.grad(found, [t for t in leaves if t.requires_grad], upstream)
    theirs = torch.autograd.grad(expected, [t for t in exact if t.requires_grad], upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) < TOLERANCE[a.dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [0, 1, 1234, 2**31, 2**62])
def test_noise_is_that_of_plain_torch(device, seed):
    from megatron_taipan.ops.gate_scores_triton import gate_scores

    samples, position = torch.tensor([7, 2**40, 0], device=device), torch.arange(50, device=device) + 2**20
    u, weight, bias = (torch.randn(shape, device=device) for shape in ((3, 50, 16), (2, 16), (2,)))
    for step in (1, torch.tensor(2**33, device=device)):
        given = {"seed": seed, "step": step, "samples": samples, "layer": 6}
        expected = gumbel_noise(seed, step, samples, position, 6)
        for places in (position, position.expand(3, 50)):
            _, found = gate_scores(u, weight, bias, position=places, **given)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        shard = u.flatten(0, 1)[60:105]  # a tensor rank's tokens
        _, found = gate_scores(shard, weight, bias, position=position, offset=60, **given)
        torch.testing.assert_close(found, expected.flatten(0, 1)[60:105], rtol=1e-6, atol=1e-6)
