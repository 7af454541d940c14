"""How far rounding alone takes the little networks of the parity tables at the sizes that GPUs run them, on a CPU.

    python -m tests.distributed.floors

Behind the limits of parity.py: float32 against float64, bf16 on one to four ranks, and what one token is worth that a
gate decides otherwise. Where Triton is there, TRITON_INTERPRET=1 adds the kernels in float32 over four ranks.
"""

import os
from typing import Any

import torch

from megatron_taipan.model.gate import Gate, Selection
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops
from tests.distributed.launch import launch, same_packages
from tests.distributed.matrix import run_bf16, table
from tests.distributed.parity import Case, Setting, configure, make_batch, run_cases

FOUR_GROUPS = Case("taipan", n_groups=4, n_kv_heads=4)
SPREAD = [
    Case("taipan", tensor=2, n_groups=4, n_kv_heads=4),
    Case("taipan", tensor=4, sequence=True, zero=3, n_groups=4, n_kv_heads=4),
    Case("taipan", tensor=4, n_groups=2),
]
INTERPRETED = [SPREAD[2], Case("taipan", tensor=4, sequence=True, n_groups=4, n_kv_heads=4)]


class GpuSizes(Setting):
    """The lengths and widths of the tables on GPUs."""

    @property
    def length(self) -> int:
        return Setting(on_gpu=True).length

    @property
    def sizes(self) -> dict[str, Any]:
        return Setting(on_gpu=True).sizes


def network(dtype: torch.dtype) -> Taipan:
    """As `parity.reference` makes it."""
    return Taipan(configure(FOUR_GROUPS, GpuSizes()).model, seed=3, ops=pick_ops("reference")).to(dtype)


def loss(model: Taipan) -> torch.Tensor:
    """Of the first step."""
    batch = make_batch(0, True, GpuSizes())
    return model(
        batch["tokens"], labels=batch["labels"], loss_mask=batch["loss_mask"].to(model.embedding.weight.dtype),
        seq_idx=batch["seq_idx"], samples=batch["sample"], step=0,
    ).loss  # fmt: skip


def rounding_of_gradients() -> tuple[float, str]:
    """The largest relative difference of a parameter's gradient between float32 and float64, and whose."""
    models = network(torch.float32), network(torch.float64)
    for model in models:
        loss(model).backward()
    pairs = zip(*(model.named_parameters() for model in models), strict=True)
    return max((((a.grad - b.grad).norm() / b.grad.norm()).item(), name) for (name, a), (_, b) in pairs)


def worth_of_a_token(every: int = 16) -> list[float]:
    """Relative changes of the loss, sorted, each with one gate's decision on one token turned round."""
    model, turned = network(torch.float32), {"layer": -1, "token": 0}

    def turn(gate: Gate, _: Any, selection: Selection) -> Selection:
        if gate.layer != turned["layer"]:
            return selection
        selected, m = selection.selected.clone(), selection.m.detach().clone()
        selected.view(-1)[turned["token"]] ^= True
        m.view(-1)[turned["token"]] = selected.view(-1)[turned["token"]].to(m.dtype)
        return selection._replace(selected=selected, m=m)

    gates = [module for module in model.modules() if isinstance(module, Gate)]
    for gate in gates:
        gate.register_forward_hook(turn)
    changes = []
    with torch.no_grad():
        usual = loss(model).item()
        for turned["layer"] in [gate.layer for gate in gates]:
            for turned["token"] in range(0, GpuSizes().batch * GpuSizes().length, every):
                changes.append(abs(loss(model).item() - usual) / usual)
    return sorted(changes)


def main() -> None:
    """Prints all of it."""
    difference, name = rounding_of_gradients()
    print(f"float32 against float64, {FOUR_GROUPS}: gradients {difference:.1e} ({name})")
    changes = worth_of_a_token()
    median = changes[len(changes) // 2]
    print(f"one token that a gate decides otherwise: the loss by up to {changes[-1]:.1e}, median {median:.1e}")
    print(table(run_bf16(SPREAD, GpuSizes(precision="bf16"))))
    if os.environ.get("TRITON_INTERPRET") == "1":
        env = same_packages()
        for case in INTERPRETED:
            result = launch(4, run_cases, [case], Setting(interpreted=True), [None], timeout=900, env=env)[0][0]
            print(f"kernels interpreted, {case}: gradients {result['grad']:.1e}")


if __name__ == "__main__":
    # by its name as a module, which the ranks can import too
    from tests.distributed import floors

    floors.main()
