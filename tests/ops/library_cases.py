"""Other projects' kernels behind our interfaces against the references in float64, on a CPU's stand-ins or a GPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from megatron_taipan.ops.choices import FOREIGN, RunFacts
from megatron_taipan.ops.cross_entropy import linear_cross_entropy_reference
from megatron_taipan.ops.interval_attention import interval_attention_reference
from megatron_taipan.ops.ssd import ssd_reference
from tests.ops.kernel_checks import error, with_gradients


def loaded(option: str, choice: str, **facts) -> Callable:
    return FOREIGN[option][choice].load(RunFacts(**facts))[0]


def documents(b: int, l: int, device: str, first: int = 0) -> Tensor:
    """[b, l] int32 numbers of documents of about 40 tokens, from `first` on."""
    made = torch.Generator().manual_seed(7)
    return (first + (torch.rand(b, l, generator=made) < 0.025).cumsum(1)).int().to(device)


def randn(*shape: int, like: dict, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(**like)


def compare(
    kernel: Callable, reference: Callable, inputs: list[Tensor | None], tolerance: float, zeros: Sequence[int] = ()
) -> None:
    """Results and gradients of the kernel against the reference on the same values in float64.

    Args:
        zeros: inputs whose gradient is exactly 0. Theirs may be rounding, as parts of a hundredth of the largest one.
    """
    expected = with_gradients(reference, [t.double() if t is not None else None for t in inputs])
    got = with_gradients(kernel, inputs)
    assert not any(expected[1 + at].any() for at in zeros)
    least = max(t.norm().item() for t in expected[1:]) / 100
    floors = [least if at - 1 in zeros else 0.0 for at in range(len(expected))]
    errors = [error(a, b, floor) for a, b, floor in zip(got, expected, floors, strict=True)]
    assert all(e < tolerance for e in errors), errors


def check_scan(
    device: str, dtype: torch.dtype, tolerance: float, *, l: int, packed: bool, state: bool, groups: int = 1,
    heads: int = 4, headdim: int = 64, d_state: int = 128, chunk_size: int = 256,
) -> None:  # fmt: skip
    """mamba_ssm's scan; with `state` it begins in one and returns one, and documents are numbered from 3 on."""
    b, like = 2, {"device": device, "dtype": dtype}
    wide = like | {"dtype": torch.promote_types(dtype, torch.float32)}
    run = loaded("ssd", "mamba_ssm")
    options = {"chunk_size": chunk_size, "seq_idx": documents(b, l, device, first=3 * state) if packed else None}
    inputs = [
        randn(b, l, heads, headdim, like=like), torch.rand(b, l, heads).to(**wide) * 0.3,
        -torch.rand(heads).to(**wide) * 3 - 0.5, randn(b, l, groups, d_state, like=like),
        randn(b, l, groups, d_state, like=like), randn(heads, like=wide),
        randn(b, heads, headdim, d_state, like=wide) if state else None,
    ]  # fmt: skip

    def both(scan: Callable) -> Callable:
        def call(x, dt, A, B, C, D, initial):
            y = scan(x, dt, A, B, C, D=D, initial_state=initial, return_state=state, **options)
            return torch.cat([t.flatten().to(wide["dtype"]) for t in y]) if state else y

        return call

    compare(both(run), both(ssd_reference), inputs, tolerance)


def check_conv(
    device: str, dtype: torch.dtype, tolerance: float, *, l: int, packed: bool, tail: bool, bias: bool = True,
    width: int = 4, extra: int = 3,
) -> None:  # fmt: skip
    """causal_conv1d on columns of a wider buffer, as in the mixer; `extra` columns make its rows unaligned or not."""
    b, c, like = 2, 24, {"device": device, "dtype": dtype}
    run = loaded("conv", "causal_conv1d")
    options = {"seq_idx": documents(b, l, device) if packed else None, "return_tail": tail}
    inputs = [
        randn(b, l, 16 + c + extra, like=like), randn(c, width, like=like, scale=0.5),
        randn(c, like=like) if bias else None, randn(b, width - 1, c, like=like) if tail else None,
    ]  # fmt: skip

    def both(conv: Callable) -> Callable:
        def call(wide, weight, bias, before):
            y = conv(wide[..., 16 : 16 + c], weight, bias, initial_tail=before, **options)
            return torch.cat(y, 1) if tail else y

        return call

    compare(both(run), both(causal_conv1d_reference), inputs, tolerance)


def check_attention(
    choice: str, device: str, dtype: torch.dtype, tolerance: float, *, l: int, packed: bool, window: int | None,
    heads: int = 4, kv_heads: int = 2, head_dim: int = 64,
) -> None:  # fmt: skip
    """Attention from every token, by documents where packed."""
    b, like = 2, {"device": device, "dtype": dtype}
    run = loaded("attention", choice, packed=packed)
    seq_idx = documents(b, l, device) if packed else torch.zeros(b, l, device=device)
    place = torch.arange(l, device=device)
    begins = torch.ones(b, l, dtype=torch.bool, device=device)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    start = torch.where(begins, place, 0).cummax(1).values  # [b, l]
    row = torch.arange(b, device=device)[:, None] * l
    lo = (row + (start if window is None else torch.maximum(start, place - window + 1))).flatten()
    inputs = [randn(b * l, n, head_dim, like=like) for n in (heads, kv_heads, kv_heads)]
    compare(
        lambda q, k, v: run(q, k, v, start, window),
        lambda q, k, v: interval_attention_reference(q, k, v, lo, (row + place).flatten()), inputs, tolerance,
        zeros=(0, 1) if window == 1 else (),  # a query that sees one key takes all of it, whatever both hold
    )  # fmt: skip


def check_cross_entropy(choice: str, device: str, dtype: torch.dtype, tolerance: float, *, n: int, vocab: int) -> None:
    """The head's loss with weights of tokens, some of them 0, and three rows of padding in the head, so large that they
    would take most of a softmax that did not leave them out."""
    d, like = 64, {"device": device, "dtype": dtype}
    run = loaded("cross_entropy", choice)
    labels = torch.randint(0, vocab, (n,), device=device)
    scale = torch.rand(n, device=device) * (torch.rand(n, device=device) < 0.8) / n
    inputs = [randn(n, d, like=like), randn(vocab + 3, d, like=like, scale=0.2)]
    inputs[1][vocab:] *= 10

    def both(loss: Callable) -> Callable:
        return lambda hidden, weight: 1000 * loss(hidden, weight, labels, scale, n_valid=vocab)

    compare(both(run), both(linear_cross_entropy_reference), inputs, tolerance)
