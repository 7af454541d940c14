"""Muon on a GPU: the CPU's steps, and nothing that waits for the device."""

import pytest
import torch

from tests.engine.test_muon import SHAPES, STEPS, give_gradients, made_optimizer, stepped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("queued", [False, True])
def test_steps_are_the_cpus_and_wait_for_nothing(queued):
    views, ours = made_optimizer(torch.float32, device="cuda")
    expected, theirs = made_optimizer(torch.float32)
    for step in range(STEPS):
        for optimizer, device in ((ours, "cuda"), (theirs, "cpu")):
            give_gradients(optimizer, step)
            if queued:
                optimizer.grad_scale = torch.tensor(2.0, device=device)
                optimizer.found_inf = torch.tensor(float(step == 1), device=device)
        torch.cuda.synchronize()
        if step:  # the first call of a matrix product makes cuBLAS's workspace
            torch.cuda.set_sync_debug_mode("error")
        try:
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        theirs.step()
    for name in (*SHAPES, "vector"):
        torch.testing.assert_close(views[name].cpu(), expected[name], rtol=1e-4, atol=1e-5)
    assert {int(ours.state[p]["step"]) for p in stepped(ours)} == {STEPS - queued}
