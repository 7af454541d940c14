"""The chunked scan against the recurrence that it stands for, one time step after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_taipan.ops.ssd import ssd_reference, ssd_step


def recurrence(x, dt, A, B, C, D=None, seq_idx=None, state=None) -> tuple[Tensor, Tensor]:
    """s_t = exp(dt_t A) s_{t-1} + dt_t x_t B_t^T, y_t = s_t C_t + D x_t; s = 0 where a document begins."""
    b, l, h, p = x.shape
    n, per_group = B.shape[3], h // B.shape[2]
    state = x.new_zeros(b, h, p, n) if state is None else state
    outputs = []
    for t in range(l):
        if t and seq_idx is not None:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        heads = []
        for head in range(h):
            group = head // per_group
            decay = torch.exp(dt[:, t, head] * A[head])[:, None, None]
            fed = dt[:, t, head, None, None] * x[:, t, head, :, None] * B[:, t, group, None, :]
            heads.append(decay * state[:, head] + fed)
        state = torch.stack(heads, 1)
        y = torch.stack([(state[:, k] * C[:, t, None, k // per_group]).sum(-1) for k in range(h)], 1)
        outputs.append(y if D is None else y + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def inputs(b=2, l=11, h=4, p=3, g=2, n=5, seed=0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    return {
        "x": normal(b, l, h, p),
        "dt": normal(b, l, h).exp() * 0.3,
        "A": -normal(h).exp(),
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n),
        "D": normal(h),
    }


@st.composite
def documents(draw, b: int, l: int) -> Tensor:
    """[b, l] document numbers: non-decreasing, not always from 0, with gaps, other cuts in each row."""
    steps = [[draw(st.sampled_from([0, 0, 0, 1, 3])) for _ in range(l)] for _ in range(b)]
    return torch.tensor(steps, dtype=torch.int32).cumsum(1, dtype=torch.int32)


@settings(max_examples=30)
@given(st.data())
def test_any_shape_chunk_and_packing_equals_the_recurrence(data):
    g = data.draw(st.sampled_from([1, 2, 3]))
    b, l, h = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 13)), g * data.draw(st.integers(1, 2))
    given_inputs = inputs(b, l, h, p=2, g=g, n=3, seed=l)
    seq_idx = data.draw(st.none() | documents(b, l))
    state = torch.randn(b, h, 2, 3, dtype=torch.float64) if data.draw(st.booleans()) else None
    chunk = data.draw(st.integers(1, 16))
    y, last = ssd_reference(**given_inputs, chunk_size=chunk, seq_idx=seq_idx, initial_state=state, return_state=True)
    expected, expected_last = recurrence(**given_inputs, seq_idx=seq_idx, state=state)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(last, expected_last, rtol=0, atol=1e-11)


def test_every_gradient_equals_the_recurrences():
    names = list(inputs())
    seq_idx = torch.tensor([[0] * 4 + [1] * 5 + [2] * 2, [0] * 11], dtype=torch.int32)
    gradients = []
    for scan in (lambda **a: ssd_reference(**a, chunk_size=4, return_state=True), recurrence):
        leaves = {k: v.requires_grad_() for k, v in inputs().items()}
        key = "initial_state" if not gradients else "state"
        leaves[key] = torch.ones(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
        y, last = scan(**leaves, seq_idx=seq_idx)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        gradients.append(torch.autograd.grad((y * weights).sum() + last.square().sum(), list(leaves.values())))
    for name, ours, theirs in zip([*names, "state"], *gradients, strict=True):
        assert theirs.abs().max() > 0.01, name
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=15)
@given(st.data())
def test_states_chained_over_arbitrary_cuts_equal_one_scan(data):
    l = 12
    given_inputs, seq_idx = inputs(1, l), data.draw(documents(1, l))
    D = given_inputs.pop("D")
    A = given_inputs.pop("A")
    whole, whole_last = recurrence(**given_inputs, A=A, D=D, seq_idx=seq_idx)
    # A piece continues the document of the piece before: cuts lie where no document begins, or the state is dropped.
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, l - 1), max_size=4))), l]
    state, parts = None, []
    for start, end in zip(cuts, cuts[1:], strict=False):
        if start and seq_idx[0, start] != seq_idx[0, start - 1]:
            state = None
        piece = {k: v[:, start:end] for k, v in given_inputs.items()}
        y, state = ssd_reference(
            **piece, A=A, D=D, chunk_size=3, seq_idx=seq_idx[:, start:end], initial_state=state, return_state=True
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(state, whole_last, rtol=0, atol=1e-11)


def test_packed_documents_equal_separate_ones():
    given_inputs = inputs(1, 13)
    seq_idx = torch.tensor([[0] * 3 + [1] * 7 + [2] * 3])
    packed = ssd_reference(**given_inputs, chunk_size=4, seq_idx=seq_idx)
    for document in range(3):
        here = seq_idx[0] == document
        alone = {k: v if k in ("A", "D") else v[:, here] for k, v in given_inputs.items()}
        torch.testing.assert_close(packed[:, here], ssd_reference(**alone, chunk_size=4), rtol=0, atol=1e-12)


def test_a_document_is_bit_equal_whatever_stands_before_it():
    given_inputs = {k: v.float() for k, v in inputs(1, 24).items()}
    other = {k: v if k in ("A", "D") else v.clone() for k, v in given_inputs.items()}
    for name in ("x", "dt", "B", "C"):
        other[name][:, :9] = other[name][:, :9].abs() * 1.7
    seq_idx = torch.tensor([[0] * 9 + [1] * 15])
    first, second = (ssd_reference(**i, chunk_size=8, seq_idx=seq_idx)[:, 9:] for i in (given_inputs, other))
    assert torch.equal(first, second)


def test_the_step_equals_the_recurrence():
    given_inputs = inputs()
    A, D = given_inputs.pop("A"), given_inputs.pop("D")
    state, outputs = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for t in range(11):
        y, state = ssd_step(state, A=A, D=D, **{k: v[:, t] for k, v in given_inputs.items()})
        outputs.append(y)
    expected, last = recurrence(**given_inputs, A=A, D=D)
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_accumulated_in_float32(dtype):
    low = {k: v.to(dtype) for k, v in inputs(l=40).items()}
    low["dt"], low["A"] = low["dt"].float(), low["A"].float()
    y, state = ssd_reference(**low, chunk_size=16, return_state=True)
    expected, _ = recurrence(**{k: v.double() for k, v in low.items()})
    assert y.dtype == dtype and state.dtype == torch.float32
    # Only the last rounding is in the low precision: half a unit in the last place of the result.
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
