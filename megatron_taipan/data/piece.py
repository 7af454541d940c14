"""Which tokens of every row a rank reads."""

from dataclasses import dataclass
from typing import Protocol

from megatron_taipan.errors import UserError


class Place(Protocol):
    """A rank among those that hold the pieces of the same rows (`megatron_taipan.parallel.context.ContextParallel`)."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class RowPiece:
    """Piece number `rank` of rows that are cut into `size` equal, contiguous pieces; (0, 1) is the whole row.

    Raises:
        ValueError: there is no such piece.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"a row has no piece {self.rank} of {self.size}")

    @classmethod
    def held_at(cls, place: Place | None) -> "RowPiece":
        """What the rank at that place reads; None: it has whole rows."""
        return cls() if place is None else cls(place.rank, place.size)

    def positions(self, seq_len: int) -> range:
        """The positions of a row of `seq_len` tokens that belong to the piece.

        Raises:
            UserError: such rows cannot be cut into equal pieces.
        """
        length, left = divmod(seq_len, self.size)
        if left or not length:
            near = [n for n in (length * self.size, (length + 1) * self.size) if n]
            raise UserError(
                f"rows of data.seq_len={seq_len} tokens cannot be cut into parallel.context={self.size} equal pieces"
                f" (remainder {left}); set data.seq_len to {' or '.join(map(str, near))}, or change parallel.context"
            )
        return range(self.rank * length, (self.rank + 1) * length)
