"""The cross entropy of a linear head against torch's over all logits."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F

from megatron_taipan.ops import cross_entropy
from megatron_taipan.ops.cross_entropy import linear_cross_entropy_reference

N, D, V = 13, 6, 11


def inputs(dtype=torch.float64):
    made = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=made, dtype=dtype) * 2 for s in ((N, D), (V, D)))
    labels = torch.randint(0, V, (N,), generator=made)
    token_weights = torch.rand(N, generator=made)
    token_weights[[2, 5]] = 0
    return hidden.requires_grad_(), weight.requires_grad_(), labels, token_weights


def torchs(hidden, weight, labels, token_weights):
    per_token = F.cross_entropy(F.linear(hidden, weight), labels, reduction="none")
    return (per_token * token_weights).sum()


@pytest.mark.parametrize("elements", [1, 3 * V, 1 << 25], ids=["one row", "three rows", "all rows"])
def test_equals_torchs_for_any_chunk(monkeypatch, elements):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    hidden, weight, labels, token_weights = inputs()
    ours, theirs = (f(hidden, weight, labels, token_weights) for f in (linear_cross_entropy_reference, torchs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(3 * y, (hidden, weight)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 2.0**-20])
def test_the_loss_of_a_million_tokens_is_the_mean_of_theirs(monkeypatch, scale):
    """An untrained network's losses are alike, so a sum in float32 would be rounded the same way in every chunk."""
    n, v = 1 << 20, 16
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 256 * v)  # rows of a chunk as with 2^17 ids
    labels, weight = torch.zeros(n, dtype=torch.int64), torch.zeros(v, 1)
    loss = linear_cross_entropy_reference(torch.zeros(n, 1), weight, labels, torch.full((n,), scale))
    assert loss.dtype == torch.float32
    assert float(loss) / (n * scale) == pytest.approx(math.log(v), rel=1e-6)


def test_only_a_chunk_of_logits_is_ever_held(monkeypatch):
    """The largest tensor that any operation makes has the chunk's size."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 2 * V)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == V:
                largest.append(out.shape[0])
            return out

    with Watch():
        linear_cross_entropy_reference(*inputs()).backward()
    assert max(largest) < N


def test_padding_rows_of_the_head_are_no_tokens():
    hidden, weight, labels, token_weights = inputs()
    padded = torch.cat([weight.detach(), torch.full((3, D), 9.0, dtype=torch.float64)]).requires_grad_()
    ours = linear_cross_entropy_reference(hidden, padded, labels, token_weights, n_valid=V)
    theirs = torchs(hidden, weight, labels, token_weights)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gh, gw = torch.autograd.grad(ours, (hidden, padded))
    eh, ew = torch.autograd.grad(theirs, (hidden, weight))
    torch.testing.assert_close(gh, eh, rtol=0, atol=1e-12)
    torch.testing.assert_close(gw[:V], ew, rtol=0, atol=1e-12)
    assert (gw[V:] == 0).all()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_vocabulary_split_over_ranks(monkeypatch, ranks):
    """Each thread is a rank with its rows; 11 ids over 3 or 4 ranks leave padding, with 4 the last has fewer rows."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 15)
    hidden, weight, labels, token_weights = inputs()
    rows = -(-V // ranks)
    full = F.pad(weight.detach(), (0, 0, 0, rows * ranks - V), value=5.0)
    board, barrier, results = [None] * ranks, threading.Barrier(ranks), [None] * ranks

    def run(rank: int) -> None:
        def reduce(join):
            def reduced(x):
                board[rank] = x.clone()
                barrier.wait()
                out = join(torch.stack(board))
                barrier.wait()
                return out

            return reduced

        own = full[rank * rows : (rank + 1) * rows].clone().requires_grad_()
        h = hidden.detach().clone().requires_grad_()
        start = rank * rows
        loss = linear_cross_entropy_reference(
            h, own, labels, token_weights, vocab_start=start, n_valid=min(max(V - start, 0), rows),
            reduce_sum=reduce(lambda t: t.sum(0)), reduce_max=reduce(lambda t: t.amax(0)),
        )  # fmt: skip
        loss.backward()
        results[rank] = loss.detach(), h.grad, own.grad

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    theirs = torchs(hidden, weight, labels, token_weights)
    eh, ew = torch.autograd.grad(theirs, (hidden, weight))
    for loss, _, _ in results:
        torch.testing.assert_close(loss, theirs.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(r[1] for r in results), eh, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[2] for r in results])[:V], ew, rtol=0, atol=1e-12)


def test_large_logits_do_not_overflow_and_low_precision_sums_in_float32():
    hidden, weight, labels, token_weights = inputs(torch.float32)
    loss = linear_cross_entropy_reference(hidden * 1e3, weight, labels, token_weights)
    assert loss.dtype == torch.float32 and loss.isfinite()
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy_reference(*low, labels, token_weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.item(), torchs(*(t.double() for t in low), labels, token_weights).item(), rtol=1e-2, atol=0
    )
    loss.backward()
    assert low[0].grad.dtype == low[1].grad.dtype == torch.bfloat16


def test_without_gradients_none_are_computed():
    hidden, weight, labels, token_weights = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy_reference(hidden, weight, labels, token_weights)
    assert not loss.requires_grad
    (grad,) = torch.autograd.grad(
        linear_cross_entropy_reference(hidden.detach(), weight, labels, token_weights), (weight,)
    )
    assert grad.shape == weight.shape


@pytest.mark.parametrize("count", [1, 8192, 2**20])
def test_in_fp16_the_loss_scale_reaches_the_logits_gradients(count):
    """Under a mean over a large batch the gradient of most logits is below fp16's smallest number."""
    tokens, vocab = 64, 3000
    hidden, weight = torch.randn(tokens, 32).half(), (torch.randn(vocab, 32) / 32).half()
    labels, token_weights = torch.randint(0, vocab, (tokens,)), torch.rand(tokens) / count
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(torchs(*exact, labels, token_weights.double()), exact)
    low = [t.requires_grad_() for t in (hidden, weight)]
    upstream = torch.tensor(float(min(count, 1024)))  # as much as the gradients of hidden can take
    gradients = torch.autograd.grad(
        linear_cross_entropy_reference(*low, labels, token_weights), low, grad_outputs=upstream
    )
    for got, wanted in zip(gradients, expected, strict=True):
        assert got.dtype == torch.float16 and got.isfinite().all()
        wanted = wanted * upstream.double()
        assert (got.double() - wanted).norm() / wanted.norm() < 3e-3
