"""Every kernel finds its numbers however a tensor lies in memory: columns, transposed and expanded views, offsets.

Each operation is called with tensors side by side in memory and with views of equal values, gradients included:
outputs and gradients must be the same bits, or, where torch multiplies, the same to rounding. On a GPU, or in Triton's
interpreter with TRITON_INTERPRET=1.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.ops.fast import FUSIONS, KERNELS
from megatron_taipan.ops.selected_rows import Rows
from tests.ops.devices import DEVICES, interpreted_only
from tests.ops.pieces import Chain

pytest.importorskip("triton")

device = pytest.mark.parametrize("device", DEVICES)

VALUES_STAY = (
    "behind another element", "of the other type", "every other element", "columns", "with odd strides",
    "first dimensions turned", "last dimensions turned", "all dimensions turned",
)  # fmt: skip
KINDS = (
    *VALUES_STAY, "expanded along 0", "expanded along 1", "expanded along 2", "expanded along 3", "one element",
    "windows",
)  # fmt: skip
TURNED = "every other element", "last dimensions turned", "one element"
ON_GPU = (*TURNED, "behind another element", "with odd strides", "expanded along 0")  # each is compiled anew


class Call(NamedTuple):
    """An operation, and the tensors that it takes by name."""

    run: Callable
    tensors: dict[str, Tensor]
    apart: tuple[str, ...] = ()  # tensors of which no two elements may be one: distinct rows, and what is written
    exact: bool = True  # no product of torch's, whose sums may have another order for another layout
    kinds: tuple[str, ...] = ()  # of views, where not all of KINDS: what another call of the operation does not try


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def ints(*values) -> Tensor:
    return torch.tensor(values)


def ours(name: str, **options) -> Callable:
    """The kernel of an operation, loaded when it is called."""
    load = KERNELS[name][1] if name in KERNELS else FUSIONS[name][0]
    return lambda *args, **tensors: load()(*args, **tensors, **options)


def by_rows(name: str, rows: str = "rows", **options) -> Callable:
    """An operation that takes `Rows`, from their two tensors."""
    return lambda at, n_valid, **tensors: ours(name, **options)(**tensors, **{rows: Rows(at, n_valid)})


def same(x: Tensor) -> Tensor:
    return x


class Received(Chain):
    """A rank, and the layout in which it gets the inputs before its piece."""

    def __init__(self, lay_out: Callable[[Tensor], Tensor]):
        super().__init__()
        self.lay_out = lay_out

    def start_before(self, reach: int, x: Tensor) -> Callable[[], list[Tensor]]:
        before = super().start_before(reach, x)()[0]
        return lambda: [self.lay_out(before)]


def in_two_pieces(zxbcdt: Tensor, known: Tensor, received: Callable = same, **tensors: Tensor) -> Tensor:
    mix, chain = ours("mamba2_mix", **MIXER, seq_idx=None), Received(received)
    first = mix(zxbcdt[:, :4], known=torch.zeros_like(known), place=chain, **tensors)
    return torch.cat([first, mix(zxbcdt[:, 4:], known=known, place=chain, **tensors)], 1)


def of_split_vocabulary(received: Callable = same, **tensors: Tensor) -> Tensor:
    return ours("linear_cross_entropy", reduce_sum=received, reduce_max=received)(**tensors)


def over_ranks(received: Callable = same, **tensors: Tensor) -> Tensor:
    return ours("gated_rms_norm", eps=1e-5, group_size=8, reduce_sum=received)(**tensors)


DOCUMENTS = ints([0, 0, 1, 1, 2], [0, 1, 1, 2, 2])
ROWS = {"at": ints(1, 2, 4, 0, 0), "n_valid": torch.tensor([3], dtype=torch.int32)}
STREAM = {"h": numbers(2, 3, 8), "branch": numbers(2, 3, 8), "norm_weight": numbers(8)}
NORM = {"y": numbers(2, 3, 8), "z": numbers(2, 3, 8), "weight": numbers(8)}
CONV = {"x": numbers(2, 3, 6), "weight": numbers(6, 4), "bias": numbers(6)}
MIXER = {"headdim": 16, "groups": 1, "d_state": 16, "group_size": 32, "eps": 1e-5}
MIXED = {
    "conv_weight": numbers(64, 4), "conv_bias": numbers(64), "dt_bias": numbers(2), "A": -numbers(2).exp(),
    "D": numbers(2), "norm_weight": numbers(32),
}  # fmt: skip

CALLS = {
    "ssd": Call(
        ours("ssd", chunk_size=64, return_state=True),
        {
            "x": numbers(2, 5, 2, 16), "dt": numbers(2, 5, 2).exp(), "A": -numbers(2).exp(), "B": numbers(2, 5, 2, 16),
            "C": numbers(2, 5, 2, 16) * 2, "D": numbers(2), "seq_idx": DOCUMENTS,
            "initial_state": numbers(2, 2, 16, 16),
        },
    ),
    "ssd of whole chunks": Call(  # whose tiles the copy engine moves where they lie as it needs them
        ours("ssd", chunk_size=64, return_state=True),
        {
            "x": numbers(2, 64, 2, 16), "dt": numbers(2, 64, 2).exp(), "A": -numbers(2).exp(),
            "B": numbers(2, 64, 2, 16), "C": numbers(2, 64, 2, 16) * 2, "D": numbers(2),
            "seq_idx": torch.arange(128).view(2, 64) // 20, "initial_state": numbers(2, 2, 16, 16),
        },
    ),
    "causal_conv1d": Call(ours("causal_conv1d", return_tail=True), CONV | {"seq_idx": DOCUMENTS[:, 1:4].clone()}),
    "causal_conv1d after a tail": Call(
        lambda initial_tail, **tensors: ours("causal_conv1d")(**tensors, initial_tail=initial_tail.detach()),
        CONV | {"initial_tail": numbers(2, 3, 6)}, kinds=TURNED,
    ),
    "rms_norm": Call(ours("rms_norm", eps=1e-5), {"x": numbers(2, 3, 8), "weight": numbers(8)}),
    "add_rms_norm": Call(
        lambda norm_weight, **tensors: ours("add_rms_norm", eps=1e-5)(**tensors, weight=norm_weight), STREAM
    ),
    "gated_rms_norm": Call(ours("gated_rms_norm", eps=1e-5, group_size=4), NORM),
    "gated_rms_norm over ranks": Call(over_ranks, NORM, kinds=TURNED),
    "interval_attention": Call(
        ours("interval_attention"),
        {
            "q": numbers(5, 4, 16), "k": numbers(6, 2, 16), "v": numbers(6, 2, 16), "lo": ints(0, 0, 1, 3, 3),
            "hi": ints(0, 1, 2, 3, 5),
        },
    ),
    "interval_attention of one token": Call(
        ours("interval_attention"),
        {"q": numbers(1, 4, 16), "k": numbers(1, 2, 16), "v": numbers(1, 2, 16), "lo": ints(0), "hi": ints(0)},
    ),
    "linear_cross_entropy": Call(
        of_split_vocabulary,
        {
            "hidden": numbers(5, 8), "weight": numbers(7, 8), "labels": ints(0, 6, 3, 3, 1),
            "token_weights": numbers(5).exp(),
        },
        exact=False,
    ),
    "rotate": Call(ours("rotate"), {"x": numbers(5, 2, 8), "cos": numbers(5, 4), "sin": numbers(5, 4) * 2}),
    "silu_mul": Call(ours("silu_mul"), {"gate": numbers(2, 3, 8), "up": numbers(2, 3, 8) * 2}),
    "select_rows": Call(ours("select_rows"), {"like": numbers(5, 8), "selected": ints(0, 1, 1, 0, 1).bool()}),
    "gather_linear": Call(
        by_rows("gather_linear"), ROWS | {"x": numbers(5, 8), "weight": numbers(6, 8)}, apart=("at",)
    ),
    "bounded_linear": Call(
        by_rows("bounded_linear"), ROWS | {"x": numbers(5, 8), "weight": numbers(6, 8)}, apart=("at",)
    ),
    "scatter_rows": Call(
        by_rows("scatter_rows", n=6), ROWS | {"x": numbers(5, 8), "onto": numbers(6, 8)}, apart=("at",)
    ),
    "refine": Call(
        ours("refine"), {"h": numbers(2, 3, 8), "o": numbers(2, 3, 8) * 2, "weight": numbers(2, 3)}
    ),
    "refine by a sum": Call(
        ours("refine", add=True), {"h": numbers(2, 3, 8), "o": numbers(2, 3, 8) * 2, "weight": numbers(2, 3)}
    ),
    "gate_scores": Call(
        ours("gate_scores", seed=3, layer=1),
        {
            "u": numbers(2, 3, 8), "weight": numbers(2, 8), "bias": numbers(2), "step": torch.tensor(5),
            "samples": ints(7, 2**20), "position": ints([0, 1, 2], [3, 4, 5]),
        },
    ),
    "decode_attention": Call(
        ours("decode_attention"),
        {
            "q": numbers(2, 4, 16), "k": numbers(2, 2, 16), "v": numbers(2, 2, 16) * 2, "keys": numbers(2, 5, 2, 16),
            "values": numbers(2, 5, 2, 16) * 2, "first": torch.tensor(1), "position": ints(3), "start": ints(1, 2),
            "chosen": ints(1, 0).bool(),
        },
        apart=("keys", "values"),
    ),
    "conv_update": Call(
        ours("conv_update"),
        {"tail": numbers(2, 3, 6), "x": numbers(2, 6), "weight": numbers(6, 4), "bias": numbers(6)}, apart=("tail",),
    ),
    "ssd_update": Call(
        ours("ssd_update"),
        {
            "state": numbers(2, 4, 16, 16), "x": numbers(2, 4, 16), "dt": numbers(2, 4), "dt_bias": numbers(4),
            "A_log": numbers(4), "B": numbers(2, 2, 16), "C": numbers(2, 2, 16) * 2, "D": numbers(4),
        },
        apart=("state",),
    ),
    "mamba2_mix": Call(
        ours("mamba2_mix", **MIXER), MIXED | {"zxbcdt": numbers(2, 3, 98), "seq_idx": DOCUMENTS[:, 1:4].clone()},
        kinds=(*VALUES_STAY, "one element"),
    ),
    "mamba2_mix of one token": Call(
        ours("mamba2_mix", **MIXER, seq_idx=None), MIXED | {"zxbcdt": numbers(2, 1, 98)}, kinds=("with odd strides",)
    ),
    "mamba2_mix and a product": Call(
        ours("mamba2_mix", **MIXER, seq_idx=None, recompute=("conv", "states")),
        MIXED | {"zxbcdt": numbers(2, 3, 98), "out_weight": numbers(8, 32)}, exact=False, kinds=TURNED,
    ),
    "mamba2_mix in pieces": Call(
        in_two_pieces, MIXED | {"zxbcdt": numbers(2, 7, 98), "known": ints([1, 1, 1], [0, 0, 1]).bool()}, kinds=TURNED,
    ),
    "add_norm_linear": Call(ours("add_norm_linear", eps=1e-5), STREAM | {"weight": numbers(6, 8)}, exact=False),
    "add_norm_swiglu": Call(
        ours("add_norm_swiglu", eps=1e-5),
        STREAM | {"gate_weight": numbers(6, 8), "up_weight": numbers(6, 8) * 2, "down_weight": numbers(8, 6)},
        exact=False,
    ),
    "every_query": Call(
        by_rows("every_query", "learned", head_dim=16),
        ROWS
        | {
            "u": numbers(5, 8), "q_proj": numbers(32, 8), "k_proj": numbers(16, 8), "v_proj": numbers(16, 8) * 2,
            "out_proj": numbers(8, 32), "lo": ints(0, 0, 1, 3, 3), "hi": ints(0, 1, 2, 3, 4),
        },
        apart=("at",), exact=False,
    ),
}  # fmt: skip


def test_every_kernel_is_called():
    assert {name.split()[0] for name in CALLS} == {*KERNELS, *FUSIONS}


def turned(x: Tensor, a: int, b: int) -> Tensor:
    """x, its dimensions a and b exchanged in memory."""
    return x.transpose(a, b).contiguous().transpose(a, b)


def spread(x: Tensor) -> Tensor:
    """x as every other element of a tensor twice as wide; between them nan, or each integer once more."""
    wide = x.repeat_interleave(2, -1)
    if x.is_floating_point():
        wide[..., 1::2] = float("nan")
    return wide[..., ::2]


def repeated(x: Tensor, *dims: int) -> Tensor:
    """The first entries along these dimensions in the place of all; behind them in memory is nan, or 0."""
    first = x
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    behind = x.new_full((x.numel(),), float("nan") if x.is_floating_point() else 0)
    return torch.cat([first.flatten(), behind])[: first.numel()].view(first.shape).expand(x.shape)


def views(x: Tensor, shared: bool) -> dict[str, Tensor]:
    """Tensors of x's shape, with its values or (shared) with some of them in several places."""
    found = {"behind another element": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)}
    if x.dtype in (torch.int32, torch.int64):
        found["of the other type"] = x.to(torch.int64 if x.dtype == torch.int32 else torch.int32)
    if not x.dim():
        return found
    found |= {"every other element": spread(x), "columns": F.pad(x, (1, 2))[..., 1:-2]}
    if 1 in x.shape:  # strides that mean nothing
        strides = [999 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]
        found["with odd strides"] = x.clone().as_strided(x.shape, strides)
    if x.dim() > 1:
        found |= {
            "first dimensions turned": turned(x, 0, 1), "last dimensions turned": turned(x, -2, -1),
            "all dimensions turned": turned(x, 0, -1),
        }  # fmt: skip
    if shared:
        found |= {f"expanded along {dim}": repeated(x, dim) for dim in range(x.dim())}
        found["one element"] = repeated(x, *range(x.dim()))
        if x.dim() == 2:
            found["windows"] = torch.cat([x[0], x[1:, -1]]).unfold(0, x.shape[1], 1)
    return found


def results(
    call: Call, device: str, kind: str = "", laid_out: Callable[[str], bool] = lambda name: True, compact: bool = False
) -> list[Tensor | None]:
    """Outputs, what was written, and all gradients.

    Args:
        kind: of views; tensors that have no such view are plain.
        laid_out: which tensors are views, by name; upstream gradients are "gradient 0" and so on, by output.
        compact: copies of these views in their place, side by side in memory.
    """

    def lay_out(name: str, x: Tensor) -> Tensor:
        x = x.to(device)
        view = views(x, name not in call.apart).get(kind) if laid_out(name) else None
        return x.clone() if view is None else torch.empty_like(x).copy_(view) if compact else view

    given = {name: lay_out(name, x) for name, x in call.tensors.items()}
    leaves = [t.requires_grad_() for name, t in given.items() if t.is_floating_point() and name not in call.apart]
    found = call.run(**given)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    learning = {f"gradient {i}": out for i, out in enumerate(outputs) if out is not None and out.requires_grad}
    upstream = [lay_out(name, numbers(*out.shape)) for name, out in learning.items()]
    gradients = torch.autograd.grad(list(learning.values()), leaves, upstream, allow_unused=True) if learning else ()
    return [*outputs, *(given[name] for name in call.apart), *gradients]


def near(a: Tensor, b: Tensor) -> bool:
    """By the largest number or 1: a sum in another order alone moves small ones of large terms further than 1e-4 of
    them, and equal rows have gradients that are nothing but such rounding."""
    return not a.numel() or bool((a - b).abs().amax() <= 2e-5 * b.abs().amax().clamp(min=1))  # no where one is nan


def difference(found: Callable, expected: list[Tensor | None], exact: bool) -> str:
    """What is wrong with what `found` gives, or nothing."""
    try:
        pairs = list(zip(found(), expected, strict=True))
    except Exception as error:
        return f": {type(error).__name__}: {error}"
    for a, b in pairs:
        if a is None or b is None:
            equal = a is b
        else:
            equal = torch.equal(a, b) if exact or not a.is_floating_point() else near(a, b)
        if not equal:
            return ": other numbers"
    return ""


def walk_few_tokens(monkeypatch, device: str) -> None:
    """Tiles of few tokens in the interpreter, which walks over every token of a tile."""
    if device == "cpu":
        monkeypatch.setattr("megatron_taipan.ops.causal_conv1d_triton.tokens_of_run", lambda length, usual: 4)


@device
@pytest.mark.parametrize("name", CALLS)
def test_layout_of_a_tensor_changes_nothing(device, name, monkeypatch):
    """All tensors of a call are views of one kind at once; where that shows, one after the other.

    What is written must be found too, or be refused for its strides.
    """
    walk_few_tokens(monkeypatch, device)
    call, wrong = CALLS[name], []
    exact = call.exact and device == "cpu"  # a GPU may sum in another order where it loads elements one by one
    plain = results(call, device)
    assert all(t is None or t.isfinite().all() for t in plain)

    def check(kind: str, laid_out: Callable[[str], bool]) -> str:
        expected = plain if kind in VALUES_STAY else results(call, device, kind, laid_out, compact=True)
        return difference(lambda: results(call, device, kind, laid_out), expected, exact)

    for kind in [k for k in call.kinds or KINDS if device == "cpu" or k in ON_GPU]:
        for tensor in call.apart:
            found = check(kind, tensor.__eq__)
            if found and not ("ValueError" in found and "strides" in found):
                wrong.append(f"{tensor} {kind}{found}")
        if found := check(kind, lambda tensor: tensor not in call.apart):
            single = {tensor: check(kind, tensor.__eq__) for tensor in (*call.tensors, "gradient 0", "gradient 1")}
            wrong += [f"{tensor} {kind}{why}" for tensor, why in single.items() if why] or [f"all {kind}{found}"]
    assert not wrong, "\n".join(wrong)


@device
@pytest.mark.parametrize("name", ["linear_cross_entropy", "gated_rms_norm over ranks", "mamba2_mix in pieces"])
def test_layout_of_what_other_ranks_send_changes_nothing(device, name, monkeypatch):
    walk_few_tokens(monkeypatch, device)
    expected = results(CALLS[name], device)
    for lay_out in (spread, lambda x: turned(x, 0, -1), lambda x: turned(x, -2, -1) if x.dim() > 1 else x):
        call = CALLS[name]._replace(run=partial(CALLS[name].run, received=lay_out))
        assert not difference(lambda call=call: results(call, device), expected, device == "cpu")


@interpreted_only
def test_the_copy_engine_is_given_rows_that_share_no_memory(monkeypatch):
    """CUDA's documentation of tensor maps has no others, and the interpreter would read them all the same."""
    from megatron_taipan.ops import interval_attention_triton as kernels

    given, real = [], kernels.TensorDescriptor

    def descriptor(base, shape, strides, block):
        given.append(strides[0] >= shape[1])
        return real(base, shape, strides, block)

    monkeypatch.setattr(kernels, "TensorDescriptor", descriptor)
    results(CALLS["interval_attention"], "cpu", "expanded along 0")
    assert given == [True] * 8  # two forward, then two of keys and four of all
