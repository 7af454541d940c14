"""How much memory a measurement takes on a GPU; and telling a lack of it from other faults, so that it can go on."""

import torch

CPU_WORDS = ("DefaultCPUAllocator", "not enough memory")  # in the RuntimeError of torch's allocator on the CPU


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU.

    Linux may end a process on the CPU before anything is raised.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_WORDS)


def new_peak(device: torch.device) -> None:
    """Lets `peak_bytes` count what is allocated from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that torch has had allocated on a GPU since `new_peak`, weights included; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
