"""Picks which implementation of an operation runs, and says why; nothing else does."""

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch

from megatron_taipan.errors import UserError
from megatron_taipan.ops.choices import FOREIGN, OPTIONS, RunFacts, check_choices, faster_than_ours
from megatron_taipan.ops.fast import FUSIONS, KERNELS
from megatron_taipan.ops.operations import REFERENCES, Ops, takes_kernels


def pick_ops(
    backend: str = "auto",
    choices: Mapping[str, str] | None = None,
    run: RunFacts | None = None,
    recompute_mixer: Collection[str] = (),
) -> Ops:
    """Chooses the implementations once, at start-up.

    Args:
        backend: "auto" takes each fast kernel of this project that runs here, and others' where `faster_than_ours` says
            so; "reference" takes none; "fast" requires all of ours.
        choices: what overrides it, by option of choices.py: "triton", "reference" or another project's kernel; an
            option that is "auto" or not there follows the backend.
        run: what the operations must be able to do; None: no more than all of them can.
        recompute_mixer: what the fused mixer computes again in its backward pass, see `mamba2_mix`.

    Raises:
        UserError: what was asked for cannot serve the run, or cannot run here.
    """
    asked = {option: choice for option, choice in (choices or {}).items() if choice != "auto"}
    run = run or RunFacts()
    check_choices(asked, run)
    if backend != "reference" and (faster := faster_than_ours(run)) and _has_cudnn_attention():
        asked = faster | asked
    own = {name: _own(name, backend, asked) for name in (*REFERENCES, "gate_scores")}
    ours = {name for name, (kernel, _) in own.items() if kernel is not None}
    foreign = {option: choice for option, choice in asked.items() if choice in FOREIGN.get(option, {})}
    replaced = {FOREIGN[option][choice].operation for option, choice in foreign.items()}
    lacking = [f"{name}: {own[name][1]}" for name in FAST if name not in ours | replaced and not _set(name, asked)]
    if backend == "fast" and lacking:
        raise UserError(
            f"ops.backend=fast, but these kernels cannot run here: {'; '.join(lacking)}; use ops.backend=auto"
        )
    chosen = {name: _on_gpu(kernel, reference) if (kernel := own[name][0]) else reference
              for name, reference in REFERENCES.items()}  # fmt: skip
    labels = {name: label for name, (_, label) in own.items()}
    for option, choice in foreign.items():
        name = FOREIGN[option][choice].operation
        kernel, labels[name] = _foreign(option, choice, run)
        chosen[name] = _on_gpu(kernel, REFERENCES[name]) if name in REFERENCES else _on_its_gpu(kernel)
    fused = {name: _fused(load) if set(parts) <= ours - replaced else None for name, (load, parts) in FUSIONS.items()}
    for name, operation in fused.items():
        parts = ", ".join(FUSIONS[name][1])
        labels[name] = "none (its parts one by one)" if operation is None else f"triton ({parts} in one)"
    mix = fused.pop("mamba2_mix")
    if mix is not None and recompute_mixer:
        mix = partial(mix, recompute=tuple(recompute_mixer))
        labels["mamba2_mix"] += f" (again in backward: {', '.join(recompute_mixer)})"
    scores, _ = own["gate_scores"]
    unrecordable = (FOREIGN[option][choice].unrecordable(run) for option, choice in foreign.items())
    return Ops(
        **chosen, mamba2_mix=mix, add_norm_linear=fused["add_norm_linear"], add_norm_swiglu=fused["add_norm_swiglu"],
        every_query=fused["every_query"], gate_scores=_on_its_gpu(scores) if scores else None,
        kernels=frozenset(ours | (replaced & REFERENCES.keys())),
        report="ops: " + " ".join(f"{name}={label}" for name, label in labels.items()),
        unrecordable="; ".join(filter(None, unrecordable)),
    )  # fmt: skip


def _has_cudnn_attention() -> bool:
    """Whether the GPU is of the kind that was measured, or later, and torch has cuDNN's attention for it."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return False
    return torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()


def _set(name: str, asked: Mapping[str, str]) -> str | None:
    """triton or reference, where the operation's own option says so. Another project's kernel takes over one operation
    of an option; the others follow the backend."""
    option = next(option for option, names in OPTIONS.items() if name in names)
    return asked[option] if asked.get(option) in ("triton", "reference") else None


def _own(name: str, backend: str, asked: Mapping[str, str]) -> tuple[Callable | None, str]:
    """This project's kernel and its label, or None and why the reference runs.

    Raises:
        UserError: the kernel was asked for by the operation's own option, and cannot run here.
    """
    wanted = _set(name, asked) or backend
    kernel, label = (None, "reference (asked for)") if wanted == "reference" else _fast(name)
    if wanted == "triton" and kernel is None:
        option = next(option for option, names in OPTIONS.items() if name in names)
        raise UserError(
            f"ops.{option}=triton, but the kernel of {name} cannot run here: {label}; use ops.{option}=auto"
        )
    return kernel, label


def _foreign(option: str, choice: str, run: RunFacts) -> tuple[Callable, str]:
    """Another project's kernel, and its name with the version.

    Raises:
        UserError: there is no GPU, or the package is not there.
    """
    if not torch.cuda.is_available():
        raise UserError(f"ops.{option}={choice} runs on an NVIDIA GPU, and torch sees none here; use ops.{option}=auto")
    kernel, version = FOREIGN[option][choice].load(run)
    return kernel, f"{choice} {version}"


def _fast(name: str) -> tuple[Callable | None, str]:
    """The fast implementation and its label, or None and the reason."""
    if name not in FAST:
        return None, "reference (no kernel)"
    if not torch.cuda.is_available():
        return None, "reference (no CUDA)"
    label, load = FAST[name]
    try:
        return load(), label
    except ImportError as error:
        return None, f"reference ({error})"


def _fused(load: Callable[[], Callable]) -> Callable | None:
    """A kernel that does several operations in one, where Triton is."""
    try:
        return _on_its_gpu(load())
    except ImportError:
        return None


def _on_gpu(fast: Callable, reference: Callable) -> Callable:
    """The kernel for CUDA tensors in a dtype that kernels take, the reference for all others."""
    fast = _on_its_gpu(fast)

    def run(first: torch.Tensor, *args, **kwargs):
        return (fast if takes_kernels(first) else reference)(first, *args, **kwargs)

    return run


def _on_its_gpu(kernel: Callable) -> Callable:
    """A kernel that runs where its tensors are: Triton launches on the current device, wherever its arguments are."""

    def run(first: torch.Tensor, *args, **kwargs):
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():  # CPU: Triton's interpreter
            return kernel(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return kernel(first, *args, **kwargs)

    return run


# Kernels by operation: (label, function that imports and returns it; an ImportError means: not here).
FAST: dict[str, tuple[str, Callable[[], Callable]]] = KERNELS
