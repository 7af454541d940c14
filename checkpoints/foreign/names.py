"""The tensors of another library's model under our names; a tensor that no name takes is an error."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.foreign.files import Read, Shapes
from checkpoints.map_weights import Source
from megatron_taipan.errors import UserError
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parameters import parameter_table

SHOWN = 6  # names in one message


class Names:
    """Collects the renaming of one folder; `finish` checks that nothing is missing and nothing is left."""

    def __init__(self, folder: Path, shapes: Shapes, read: Read):
        self.folder, self.shapes, self.read = folder, shapes, read
        self.ours: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.notes: list[str] = []

    def whole(self, name: str, theirs: str, factor: float = 1.0) -> None:
        """Our tensor is theirs, times a factor that their network multiplies by elsewhere."""
        if self._there(theirs):
            self.ours[name] = (self.shapes[theirs], lambda: _scaled(self.read(theirs), factor))

    def cut(self, pattern: str, theirs: str, parts: dict[str, int]) -> None:
        """Ours are blocks of rows of theirs, one after the other; a convolution's dimension of one goes.

        Args:
            pattern: our names, with {} for a part's; parts: rows of each, in their order.
        """
        if not self._there(theirs):
            return
        rows, rest = sum(self.shapes[theirs][:1]), self.shapes[theirs][1:][-1:]
        if rows != sum(parts.values()):
            sizes = " + ".join(f"{part} {size}" for part, size in parts.items())
            raise UserError(
                f"{self.folder}: {theirs} has {rows} rows, config.json's sizes give {sum(parts.values())} ({sizes})"
            )
        start = 0
        for part, size in parts.items():
            self.ours[pattern.format(part)] = ((size, *rest), partial(self._rows, theirs, start, size, rest))
            start += size

    def head(
        self, embedding: str, head: str, *, tied: bool, target: ModelConfig, scale: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        """Embedding and head, whether or not the source's head is the embedding.

        Args:
            tied: what the source's settings say; scale: factors of the embedding and of the head.

        Raises:
            UserError: the settings say tied and the file holds two matrices, or the target is tied and the source not.
        """
        self.whole("embedding.weight", embedding, scale[0])
        complete = (tied or self._there(head)) and embedding in self.shapes
        if not complete:
            return
        same = head not in self.shapes or torch.equal(self.read(head), self.read(embedding))
        if tied and not same:
            raise UserError(
                f"{self.folder}: config.json ties the head to the embedding, but {head} and {embedding} differ; set it"
                " to what the weights were trained with"
            )
        if target.tie_embeddings and not (same and scale[0] == scale[1]):
            why = f"{head} is not {embedding}" if not same else f"they are multiplied by {scale[1]:g} and {scale[0]:g}"
            raise UserError(f"{self.folder} has a separate head ({why}); set model.tie_embeddings=false")
        if head in self.shapes:
            self.used.add(head)
            if same:
                self.notes.append(f"{head} repeats {embedding}")
        if not target.tie_embeddings:
            self.whole("head.weight", head if head in self.shapes else embedding, scale[1])

    def finish(self, network: ModelConfig, check: Callable[[Read], str]) -> Source:
        """The renamed tensors of `network`, the source's.

        Raises:
            UserError: some are missing, have another shape than the settings give, or are left over.
        """
        if self.missing:
            raise UserError(
                f"{self.folder} lacks {len(self.missing)} tensors that its config.json calls for"
                f" ({_some(self.missing)}); its weights are incomplete"
            )
        left = [name for name in self.shapes if name not in self.used]
        if left:
            raise UserError(
                f"{self.folder} holds {len(left)} tensors that this network has no place for ({_some(left)}): it would"
                " compute something else without them"
            )
        for name, spec in parameter_table(network).items():
            if self.ours[name][0] != spec.shape:
                raise UserError(
                    f"{self.folder}: its tensor for {name} has shape {list(self.ours[name][0])}, config.json's"
                    f" sizes give {list(spec.shape)}"
                )
        shapes = {name: shape for name, (shape, _) in self.ours.items()}
        return Source(network.letters, shapes, lambda name: self.ours[name][1](), check, self.notes)

    def _there(self, theirs: str) -> bool:
        self.used.add(theirs)
        if theirs not in self.shapes:
            self.missing.append(theirs)
        return theirs in self.shapes

    def _rows(self, theirs: str, start: int, size: int, rest: tuple[int, ...]) -> Tensor:
        """Rows [start, start + size) as [size, *rest]."""
        return self.read(theirs).narrow(0, start, size).reshape(size, *rest)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
