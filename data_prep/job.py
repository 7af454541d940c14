"""What one `tokenize` run does: everything that decides its output, and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.extract import Extract
from data_prep.inputs import WorkUnit
from data_prep.limits import DEFAULT_LIMITS, Limits
from megatron_taipan.tokenizer.base import Tokenizer

OnError = Literal["fail", "skip", "quarantine"]


@dataclass(frozen=True)
class Job:
    """Shared by all workers through fork; it is never sent anywhere."""

    units: list[WorkUnit]
    work: str  # folder of finished parts
    tokenizer: Tokenizer
    extract: Extract
    dtype: np.dtype
    bos: int | None  # id put before each document
    eod: int | None  # id put after each document
    on_error: OnError
    allow_special: bool = False  # text may spell special tokens
    marked: bool = False  # texts say which parts of them are learned: a loss mask is made
    limits: Limits = DEFAULT_LIMITS
    report: Callable[[int, int, int], None] = lambda bytes, tokens, documents: None  # adds to the progress shown

    def part(self, number: int) -> str:
        """Path of a part without its ending."""
        return f"{self.work}/{number:08d}"
