"""The gates in a training loop that never reads from the device: what they are told, what they measure, a short log."""

import torch
from torch import Tensor

from megatron_taipan.gate_config import GateConfig
from megatron_taipan.model.gate import STATS
from megatron_taipan.model.taipan import TaipanOutput
from megatron_taipan.train.schedule import gate_step


class GateVectors:
    """What the gates are told at each step, on the device: reading the shares would make the host wait for it."""

    def __init__(self, gate: GateConfig, steps: int, gates: int, device: torch.device):
        rows = [gate_step(gate, step, steps, [], gates).vector() for step in range(steps)]
        self.rows = torch.tensor(rows, dtype=torch.float32, device=device)  # [steps, 4 + gates]
        self.shares = self.rows[0, 4:]  # [gates] of the step before

    def at(self, step: int) -> Tensor:
        """[4 + gates], as `gate_step(...).vector()` with the shares of the step before."""
        return torch.cat([self.rows[step, :4], self.shares])


def measured(out: TaipanOutput) -> Tensor:
    """[gates, 4] what the gates measured, see STATS; a copy, since the next replay of a graph writes over it."""
    assert out.gate_stats is not None and out.loss is not None  # labels were given
    stats = [torch.stack([g[name] for name in STATS]).detach() for g in out.gate_stats]
    return torch.stack(stats) if stats else out.loss.new_zeros(0, len(STATS))


def log_of(losses: Tensor, stats: Tensor, points: int = 8) -> list[dict[str, float]]:
    """Loss and the first gate's statistics at evenly spaced steps, the last among them."""
    lines = []
    for step in torch.linspace(0, len(losses) - 1, min(points, len(losses))).round().int().tolist():
        line = {"step": step, "loss": losses[step].item()}
        line |= dict(zip(STATS, stats[step, 0].tolist(), strict=True)) if stats.shape[1] else {}
        lines.append({name: round(value, 4) for name, value in line.items()})
    return lines
