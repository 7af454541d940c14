"""The gates in a training loop that never reads from the device: their settings, their statistics, a short log."""

import torch
from torch import Tensor

from megatron_taipan.layer_kinds.metrics import LayerMetrics
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.train.schedule import gate_step


class GateVectors:
    """The gates' settings at each step, on the device: reading the shares would make the host wait for it."""

    def __init__(self, config: ModelConfig, steps: int, device: torch.device):
        rows = [gate_step(config.gate, step, steps, [], len(config.gated_layers)).vector() for step in range(steps)]
        self.rows = torch.tensor(rows, dtype=torch.float32, device=device)  # [steps, 4 + gates]
        self.selected = torch.tensor(LayerMetrics(config).gate_places("selected"), dtype=torch.int64, device=device)
        self.shares = self.rows[0, 4:]  # [gates] of the step before

    def at(self, step: int) -> Tensor:
        """[4 + gates], as `gate_step(...).vector()` with the shares of the step before."""
        return torch.cat([self.rows[step, :4], self.shares])

    def after(self, metrics: Tensor | None) -> Tensor:
        """Records the shares selected in a step, from its layers' `metrics` [n], and returns these; empty for None."""
        metrics = self.shares.new_zeros(0) if metrics is None else metrics
        self.shares = metrics[self.selected]
        return metrics


def log_of(losses: Tensor, metrics: Tensor, names: LayerMetrics, points: int = 8) -> list[dict[str, float]]:
    """Loss and the layers' metrics at evenly spaced steps, the last among them.

    Args:
        losses: [steps]; metrics: [steps, n].
    """
    lines = []
    for step in torch.linspace(0, len(losses) - 1, min(points, len(losses))).round().int().tolist():
        line = {"step": step, "loss": losses[step].item(), **names.named(metrics[step].tolist())}
        lines.append({name: round(value, 4) for name, value in line.items()})
    return lines
