"""The cross entropy's kernels against torch's over all logits in float64; on a GPU or with TRITON_INTERPRET=1."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.devices import DEVICES
from tests.ops.kernel_checks import error

pytest.importorskip("triton")

TOKENS, WIDTH, PADDING = 5, 6, 5.0
UPSTREAM = -2.5


class Ranks:
    """The two collectives of ranks that are played one after the other, three times: the n-th time knows the results
    of n - 1 of them, so that every rank's part of the n-th one is right."""

    def __init__(self) -> None:
        self.results: list[Tensor] = []
        self.parts: list[Tensor] = []

    def reduction(self, nth: int) -> Callable[[Tensor], Tensor]:
        def reduced(part: Tensor) -> Tensor:
            if len(self.results) == nth:
                self.parts.append(part.clone())
            return self.results[nth] if len(self.results) > nth else part

        return reduced

    def play(self, run: Callable, ranks: int) -> list:
        for combine in (torch.amax, torch.sum, torch.sum):
            outputs = [run(rank, self.reduction(1), self.reduction(0)) for rank in range(ranks)]
            if self.parts:
                self.results.append(combine(torch.stack(self.parts), 0))
                self.parts.clear()
        return outputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "vocab, ranks",
    [
        (1, 1),
        (15, 1),  # less than a block
        (65, 1),  # one more than the first pass looks at together
        (150, 1),
        (11, 3),
        (5, 4),  # the last rank has padding alone
        (131, 2),
    ],
)
def test_loss_and_gradients_of_a_vocabulary_of_any_size(monkeypatch, device, vocab, ranks):
    """With padding behind the vocabulary, which no gradient reaches, and an upstream gradient."""
    from megatron_taipan.ops import cross_entropy_triton as kernels

    monkeypatch.setattr(kernels, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, generator=generator).to(device) * 2 for shape in ((TOKENS, WIDTH), (vocab, WIDTH))
    )
    labels = torch.randint(0, vocab, (TOKENS,), generator=generator).to(device)
    token_weights = torch.rand(TOKENS, generator=generator).to(device)
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    expected = (F.cross_entropy(F.linear(*exact), labels, reduction="none") * token_weights).sum()
    wanted = [expected.detach(), *torch.autograd.grad(expected, exact, torch.full_like(expected, UPSTREAM))]

    rows = -(-vocab // ranks) + 2  # with two or more ranks the last ones have fewer than the others, or padding alone
    places = [range(min(rank * rows, vocab), min((rank + 1) * rows, vocab)) for rank in range(ranks)]

    def run(rank: int, reduce_sum: Callable, reduce_max: Callable) -> list[Tensor]:
        own = F.pad(weight[places[rank].start : places[rank].stop], (0, 0, 0, rows - len(places[rank])), value=PADDING)
        leaves = [hidden.clone().requires_grad_(), own.requires_grad_()]
        split = {"reduce_sum": reduce_sum, "reduce_max": reduce_max} if ranks > 1 else {}
        loss = kernels.linear_cross_entropy(
            *leaves, labels, token_weights, vocab_start=rank * rows, n_valid=len(places[rank]), **split
        )
        return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, UPSTREAM))]

    found = Ranks().play(run, ranks)
    for (_, _, gradient), place in zip(found, places, strict=True):
        assert not gradient[len(place) :].any()
    losses, of_hidden, of_weight = zip(*found, strict=True)
    own_rows = torch.cat([gradient[: len(place)] for gradient, place in zip(of_weight, places, strict=True)])
    errors = [error(loss, wanted[0], 1e-2) for loss in losses]
    errors += [error(sum(of_hidden), wanted[1], 1e-2), error(own_rows, wanted[2], 1e-2)]
    assert all(e < 2e-6 for e in errors), errors


@pytest.mark.parametrize("device", DEVICES)
def test_words_that_cannot_be(device):
    """All logits but the label's are minus infinity: a loss of 0, not nan."""
    from megatron_taipan.ops.cross_entropy_triton import linear_cross_entropy

    weight = torch.full((70, 1), float("-inf"), device=device)
    weight[43] = 3.0
    hidden, labels = torch.ones(2, 1, device=device), torch.full((2,), 43, device=device)
    assert linear_cross_entropy(hidden, weight, labels, torch.ones(2, device=device)).item() == 0
