"""The task of experiments/recall.py: its settings, and its rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_taipan.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What all runs of a call share. Lengths in tokens."""

    seq_len: int = 64
    pairs: tuple[int, ...] = (4, 8, 16)  # trained on all of them in equal shares; scored separately
    score_pairs: tuple[int, ...] = ()  # scored as well
    vocab_size: int = 2048
    d_model: int = 256
    d_ff: int = 256
    d_state: int = 16
    headdim: int = 64
    n_heads: int = 4
    chunk_size: int = 64
    window: int = 64  # of W and S layers
    steps: int = 2000
    batch: int = 126
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    test_rows: int = 512  # for each number of pairs

    def check(self) -> None:
        """Raises UserError where no rows can be made."""
        keys, most = self.vocab_size // 2 - 1, max(self.pairs + self.score_pairs)
        if most > keys or 3 * most > self.seq_len:
            raise UserError(
                f"{most} pairs need {3 * most} tokens and {most} keys; rows have {self.seq_len} tokens, and vocab_size="
                f"{self.vocab_size} has {keys} keys: choose fewer pairs or longer rows"
            )
        if self.batch % len(self.pairs):
            raise UserError(f"batch={self.batch} is not divisible by the {len(self.pairs)} numbers of pairs")


SMALL = Settings(
    vocab_size=64, d_model=32, d_ff=32, d_state=4, headdim=16, n_heads=2, chunk_size=32, steps=40, batch=12, lr=3e-3,
    warmup=10, test_rows=64,
)  # fmt: skip


def make_rows(s: Settings, n_pairs: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels [rows, seq_len] on the generator's device; labels are -1 where nothing is asked.

    Ids: 0 is filler, keys are 1 .. v/2 - 1, values v/2 .. v - 1. The row: k1 v1 k2 v2 ... then every key once more, in
    random order at random positions; the label at such a key is its value.
    """
    half = s.vocab_size // 2
    on: dict[str, Any] = {"generator": generator, "device": generator.device}
    keys = torch.rand(rows, half - 1, **on).topk(n_pairs).indices + 1  # distinct
    values = torch.randint(half, s.vocab_size, (rows, n_pairs), **on)
    tokens = torch.zeros(rows, s.seq_len, dtype=torch.int64, device=generator.device)
    labels = torch.full_like(tokens, -1)
    tokens[:, 0 : 2 * n_pairs : 2], tokens[:, 1 : 2 * n_pairs : 2] = keys, values
    room = s.seq_len - 2 * n_pairs
    positions = torch.rand(rows, room, **on).topk(n_pairs).indices + 2 * n_pairs  # of key 0, 1, ...
    tokens.scatter_(1, positions, keys)
    labels.scatter_(1, positions, values)
    return tokens, labels


def make_batch(s: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels [batch, seq_len], with equally many rows for each number of pairs."""
    parts = [make_rows(s, n, s.batch // len(s.pairs), generator) for n in s.pairs]
    tokens, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return tokens, labels
