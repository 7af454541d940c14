"""AdamW, and whose kernel runs it: NVIDIA's apex where it is installed, else torch's fused one, DeepSpeed's on request.

All three read and write each element once, which is what an AdamW step costs. The rest of the step is made for
torch's: it applies the factor of clipping and loss scaling as well (engine/zero.py). apex has fused norms too; those of
ops/rms_norm_triton.py also return the residual stream, which saves a pass that apex's would add.

Muon, with AdamW for the rest, is in muon.py.
"""

from collections.abc import Callable
from typing import Any

import torch

from megatron_taipan.engine.muon import MuonAdamW
from megatron_taipan.engine.protocol import Engine
from megatron_taipan.errors import UserError
from megatron_taipan.optim_config import OptimConfig

# (kernel lists, lr, beta1, beta2, eps, step, weight decay) -> None: one step of the tensors in the lists
Kernel = Callable[[list[list[torch.Tensor]], float, float, float, float, int, float], None]


def make_optimizer(groups: list[dict[str, Any]], optim: OptimConfig, *, on_gpu: bool = False) -> torch.optim.Optimizer:
    """AdamW over parameter groups, each with its weight_decay, or MuonAdamW where each says whether `muon` steps it.

    Args:
        on_gpu: whether the optimizer's state is on a GPU, where apex's and DeepSpeed's kernels run.

    Raises:
        UserError: optim.kernel names one that cannot run here.
    """
    if optim.name == "muon":
        return MuonAdamW(groups, optim)
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    kernel = _load(optim.kernel, on_gpu)
    if kernel is None:
        return torch.optim.AdamW(groups, fused=True, **options)
    load, name = kernel
    return KernelAdamW(groups, load, name, **options)


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's."""
    return engine.basic_optimizer


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Which optimizer, and whose kernel runs AdamW, for the log."""
    if isinstance(optimizer, MuonAdamW):
        return "Muon for matrices, AdamW: torch's fused kernel"
    return f"AdamW: {optimizer.name}" if isinstance(optimizer, KernelAdamW) else "AdamW: torch's fused kernel"


def loss_scale(engine: Engine) -> float | None:
    """What fp16's dynamic scaler multiplies the loss with now; None in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return float(scaler.cur_scale) if scaler is not None and getattr(scaler, "dynamic", False) else None


class KernelAdamW(torch.optim.Optimizer):
    """AdamW of float32 tensors through a multi-tensor kernel of apex or DeepSpeed.

    Their own optimizer classes count steps by parameter group, which ZeRO-3 steps tensor by tensor, and keep the
    counter where no checkpoint looks. Here it is beside each tensor's moments, as torch keeps it, on the CPU.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        load: Callable[[torch.device], Kernel],
        name: str,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.kernel = load(self.param_groups[0]["params"][0].device)
        self.name = name

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every tensor that has a gradient."""
        for group in self.param_groups:
            # one call of the kernel serves tensors with the same number of steps
            by_step: dict[int, list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_step.setdefault(self._count(p), []).append(p)
            for step, params in by_step.items():
                states = [self.state[p] for p in params]
                lists: list[list[Any]] = [
                    [p.grad for p in params],
                    params,
                    *([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq")),
                ]
                beta1, beta2 = group["betas"]
                self.kernel(lists, group["lr"], beta1, beta2, group["eps"], step, group["weight_decay"])

    def _count(self, p: torch.Tensor) -> int:
        """The number of the step that p takes now; makes its state at the first."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        if state["step"].device.type != "cpu":  # a loaded one; counting there would wait for the device
            state["step"] = state["step"].cpu()
        state["step"] += 1
        return int(state["step"])


def _load(wanted: str, on_gpu: bool) -> tuple[Callable[[torch.device], Kernel], str] | None:
    """A loader of the wanted kernel and its name; None for torch's."""
    if wanted == "torch" or (wanted == "auto" and not on_gpu):
        return None
    if not on_gpu:
        raise UserError(f"optim.kernel={wanted} runs where the optimizer's state is on a GPU; use optim.kernel=auto")
    if wanted == "deepspeed":
        return _deepspeed_kernel, "DeepSpeed's kernel"
    try:
        import amp_C  # noqa: F401  (the extension of NVIDIA's apex; the unrelated `apex` of PyPI has none)
        from apex.multi_tensor_apply import multi_tensor_applier

        if not multi_tensor_applier.available:
            raise ImportError("apex was built without its CUDA extensions")
    except ImportError as error:
        if wanted == "auto":
            return None
        raise UserError(
            f"optim.kernel=apex needs NVIDIA's apex with its CUDA extensions (github.com/NVIDIA/apex), and {error};"
            " the apex of PyPI is another project. optim.kernel=auto uses torch's kernel"
        ) from error
    return _apex_kernel, "NVIDIA apex's kernel"


def _apex_kernel(device: torch.device) -> Kernel:
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    return _multi_tensor(multi_tensor_applier, amp_C.multi_tensor_adam, device)


def _deepspeed_kernel(device: torch.device) -> Kernel:
    """Compiled at first use where DeepSpeed was installed without its extensions."""
    from deepspeed.ops.adam.multi_tensor_apply import MultiTensorApply
    from deepspeed.ops.op_builder import FusedAdamBuilder

    return _multi_tensor(MultiTensorApply(2048 * 32), FusedAdamBuilder().load().multi_tensor_adam, device)


def _multi_tensor(apply: Callable, adam: Any, device: torch.device) -> Kernel:
    """The call that apex defined and DeepSpeed took over: decoupled weight decay, bias correction."""
    overflow = torch.zeros(1, dtype=torch.int32, device=device)  # the kernel skips where it is set

    def run(lists, lr, beta1, beta2, eps, step, weight_decay):
        apply(adam, overflow, lists, lr, beta1, beta2, eps, step, 1, 1, weight_decay)

    return run
