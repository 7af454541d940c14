"""Muon for the matrices of the layers, AdamW for every other parameter.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) keeps a moving average of the gradient and steps by the
orthogonal matrix near it; with Nesterov's momentum, as in torch.optim.Muon:

    m <- mu m + (1 - mu) g        w <- (1 - lr decay) w - lr scale orthogonal(mu m + (1 - mu) g)

By default with the scale of "Muon is Scalable for LLM Training" (arXiv 2502.16982), which lets both optimizers have one
learning rate and one weight decay. Which parameters are matrices says the parameter table (`ParamSpec.is_matrix`): the
projections, each as one matrix. q, k and v are apart, as the first source advises, and not cut by heads, as in neither;
z, x, B, C and dt of Mamba-2 are apart because the table has them so: neither source tried Muon on Mamba-2.

DeepSpeed 0.19.8 has a Muon of its own in ZeRO. It orthogonalises where DeepSpeed flattens gradients, which zero.py
replaces; it would take a tensor rank's shard for the matrix; and it clips updates in place of gradients.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_taipan.config import Config
from megatron_taipan.engine.matrices import MatrixExchange
from megatron_taipan.engine.protocol import Engine
from megatron_taipan.engine.state_shards import held_shards
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.parallel.groups import Groups, group_of_stage
from megatron_taipan.param_spec import ParamSpec


class MuonAdamW(torch.optim.AdamW):
    """torch's fused AdamW, with Muon in the parameter groups that have `muon` set.

    It steps ZeRO's flat partitions, or at stage 0 the parameters. All but the orthogonal matrix is element by element;
    for that `bring_matrices` gives each group with `muon` an `exchange`. As torch's AdamW it applies `grad_scale` and
    `found_inf`, which zero.py sets, and it does not wait for the device. The average is `exp_avg`; there is no
    `exp_avg_sq`.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig):
        super().__init__(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        self.momentum = optim.muon_momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the groups that are there now: DeepSpeed shows one at a time."""
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = group["params"]
        if all(p.grad is None for p in params):
            return  # stage 0 skips a step so, on all ranks
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

        def unless_skipped(value: float, otherwise: float) -> Any:
            # not torch.where, which would bring the two numbers to the device, and wait
            return value if found_inf is None else value * (1 - found_inf) + otherwise * found_inf

        updates = {}
        for p in params:
            update = (torch.zeros_like(p) if p.grad is None else p.grad).contiguous()
            if scale is not None:
                update = update / scale
            if found_inf is not None:
                update = update.masked_fill(found_inf > 0, 0.0)  # 0 times what is not finite is not finite
            average = self.state[p]["exp_avg"].lerp_(update, unless_skipped(1 - self.momentum, 0.0))
            updates[p] = update.lerp(average, self.momentum)
            self.state[p]["step"] += unless_skipped(1.0, 0.0)
        group["exchange"].orthogonalise(updates)
        for p, update in updates.items():
            p.mul_(unless_skipped(1 - group["lr"] * group["weight_decay"], 1.0))
            p.sub_(update.mul_(unless_skipped(group["lr"], 0.0)))


def bring_matrices(engine: Engine, config: Config, groups: Groups, table: dict[str, ParamSpec]) -> None:
    """Shows an engine's MuonAdamW where its matrices are, once DeepSpeed has laid them out; collective over all ranks.

    Args:
        table: every parameter, for the run's tensor ranks.
    """
    # at stage 0 each data rank has all of its tensor rank's shards, and does the same as the others
    ranks = group_of_stage(groups) if engine.zero_optimization_stage() else groups.tensor.group
    shards = held_shards(engine, groups.zero_rank)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    for group in engine.basic_optimizer.param_groups:
        if group["muon"]:
            stepped = {id(p) for p in group["params"]}
            group["exchange"] = MatrixExchange(
                [shard for shard in shards if id(shard.flat) in stepped],
                table,
                config.optim,
                tensor_rank=groups.tensor.rank,
                tensor_size=groups.tensor.size,
                group=ranks,
                dtype=dtype,
                device=engine.device,
            )


def describe_muon(optim: OptimConfig, table: dict[str, ParamSpec]) -> list[str]:
    """What Muon steps, for the log; nothing without it."""
    if optim.name != "muon":
        return []
    sizes = {name: torch.Size(spec.shape).numel() for name, spec in table.items()}
    matrices = [name for name, spec in table.items() if spec.is_matrix]
    return [
        f"Muon: {len(matrices)} matrices with {sum(sizes[name] for name in matrices):,} of {sum(sizes.values()):,}"
        f" parameters, momentum {optim.muon_momentum:g}; AdamW: the other {len(table) - len(matrices)} tensors"
    ]
