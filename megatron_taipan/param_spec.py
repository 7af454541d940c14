"""One parameter of the whole (unsplit) model, as the table of parameters.py describes it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParamSpec:
    """Shape, split over tensor ranks, weight decay, float32, and rule of the initial value."""

    shape: tuple[int, ...]
    init: str  # which rule of model/init.py gives its first value
    split: int | None = None  # dimension split over tensor ranks; None: every rank holds all of it
    padded: bool = False  # the split dimension is filled up with zero rows to a multiple of the ranks
    decay: bool = True  # takes weight decay
    float32: bool = False  # stays float32 under bf16 and fp16
    summed: bool = False  # replicated, but each rank's gradient covers only its own heads' use of it
    elementwise: bool = False  # has two dimensions and is no projection: optim.name=muon leaves it to AdamW
    wide: bool = (
        False  # not is_matrix, and yet model.mup_base_width slows it: it sums over the width, or scales such sums
    )
    on_stream: bool = False  # replicated; where tokens are sharded, each rank's gradient covers its own tokens only

    @property
    def is_matrix(self) -> bool:
        """Whether it is a projection in a layer, from inputs to outputs, which Muon may step."""
        return len(self.shape) == 2 and not self.elementwise

    def local_shape(self, size: int) -> tuple[int, ...]:
        """The shape on one of `size` tensor ranks."""
        if self.split is None:
            return self.shape
        shape = list(self.shape)
        shape[self.split] = -(-shape[self.split] // size)
        return tuple(shape)
