"""The learning rate against torch's own schedulers."""

import pytest
import torch

from megatron_taipan.config import OptimConfig
from megatron_taipan.train.schedule import learning_rate


def test_equals_torchs_linear_warmup_followed_by_cosine():
    optim = OptimConfig(lr=5e-4, min_lr=1e-5, warmup_steps=7)
    total = 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 7)
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warmup.step()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - 7, eta_min=optim.min_lr)
    for _ in range(total - 6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert [learning_rate(step, optim, total) for step in range(total)] == pytest.approx(expected, rel=1e-9)
    assert learning_rate(total + 5, optim, total) == optim.min_lr


def test_decay_steps_and_no_warmup():
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=0, decay_steps=10)
    assert learning_rate(4, optim, 1000) == pytest.approx(0.55)  # half way down
    assert learning_rate(9, optim, 1000) == 0.1
    assert learning_rate(0, OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=4), 8) == 0.25


def test_warmup_longer_than_the_run_never_passes_the_peak():
    optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=100)
    assert max(learning_rate(step, optim, 10) for step in range(10)) == pytest.approx(0.1)
