"""Products between tensor ranks under selective recomputation: sent once, and the same results."""

import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor

from megatron_taipan.model.recompute import recompute_selected
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.tensor import TensorParallel
from tests.distributed.launch import launch
from tests.model.small import small_config, tokens
from tests.parallel.test_shards import ranks

WAYS = {"in chunks": {}, "collectives": {"overlap": False}, "all-reduces": {"sequence": False}}
PATTERN = "M W M"


def network(recompute: str, **parallel) -> Taipan:
    return Taipan(small_config(PATTERN), seed=3, tensor_parallel=ranks(**parallel), recompute=recompute).double()


def trained(way: str, recompute: str) -> tuple[Counter[str], dict[str, Tensor]]:
    """The collectives of a forward and backward pass, and the gradients."""
    model = network(recompute, **WAYS[way])
    batch = tokens(2, 13)
    model(batch[:, :-1], labels=batch[:, 1:]).loss.backward()
    return model.tp.counter.calls, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", WAYS)
def test_what_travels_with_a_product_travels_once(way):
    plainly, keeping = (launch(2, trained, way, recompute) for recompute in ("none", "selective"))
    for (plain, gradients), (kept, again) in zip(plainly, keeping, strict=True):
        # Only the attention's edges, which have no product with them, are passed again; so would be the sums of a norm
        # that spans ranks, and a gate's, which this network does not have.
        once_more = {"all-reduces": {"all_reduce": 1}}.get(way, {"all_gather": 1, "reduce_scatter": 1})
        assert kept - plain == Counter(once_more)
        assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


class Product(torch.autograd.Function):
    """x @ weight, kept; two products, as one that is made in chunks."""

    @staticmethod
    def forward(ctx, tp, x, weight):
        ctx.save_for_backward(x, weight)
        (y,) = tp.recompute_cache(lambda: (torch.cat([chunk @ weight for chunk in x.chunk(2)]),))
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return None, grad @ weight.t(), x.t() @ grad


def test_operators_within_are_not_taken_for_those_behind():
    """torch's checkpointing counts operators: one inside, seen once, would stand for one outside the second time."""
    tp = TensorParallel()
    x, first, second = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(x: Tensor) -> Tensor:
        return (Product.apply(tp, x, first).sin() @ second).sin()

    expected = torch.autograd.grad(run(x).sum(), (x, first, second))
    gradients = torch.autograd.grad(recompute_selected(tp, run, x).sum(), (x, first, second))
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


def test_a_change_in_place_is_refused():
    tp = TensorParallel()
    x, weight = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    loss = recompute_selected(tp, lambda x: Product.apply(tp, x, weight).mul_(2).sin(), x).sum()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_forward_pass_alone_leaves_nothing():
    tp = TensorParallel()
    x, weight = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    results = []

    def run(x: Tensor) -> Tensor:
        product = Product.apply(tp, x, weight)
        results.extend([weakref.ref(product), weakref.ref(tp.recompute_cache.segment)])
        return product.sin()

    loss = recompute_selected(tp, run, x).sum()
    del loss
    assert [result() for result in results] == [None, None]


def passes_in_turn() -> list[bool]:
    """Whether gradients stay the same where two forward passes come before their backward passes, as in a pipeline."""
    model = network("selective")
    batches = [tokens(2, 13, seed) for seed in (1, 2)]
    gradients = []
    for order in ([0, 1], [1, 0]):
        model.zero_grad()
        losses = [model(batch[:, :-1], labels=batch[:, 1:]).loss for batch in batches]
        for i in order:
            losses[i].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for batch in batches:
        model(batch[:, :-1], labels=batch[:, 1:]).loss.backward()
    expected = [p.grad for p in model.parameters()]
    pairs = [pair for found in gradients for pair in zip(found, expected, strict=True)]
    return [torch.allclose(*pair, rtol=1e-12, atol=1e-14) for pair in pairs]


def test_forward_passes_before_their_backward_passes():
    assert all(all(rank) for rank in launch(2, passes_in_turn))


def twice() -> str:
    model = network("selective")
    batch = tokens(2, 13)
    loss = model(batch[:, :-1], labels=batch[:, 1:]).loss
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_second_backward_pass_is_refused():
    assert all("a second backward pass through layers under selective" in said for said in launch(2, twice))
