"""Telling a lack of memory from other faults, so that a measurement can say so and go on."""

import torch

CPU_WORDS = ("DefaultCPUAllocator", "not enough memory")  # in the RuntimeError of torch's allocator on the CPU


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU.

    Linux may end a process on the CPU before anything is raised.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_WORDS)
