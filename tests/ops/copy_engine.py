"""The scan with tiles by the copy engine and without."""

import torch

from tests.ops.kernel_checks import error


def assert_engine_changes_nothing(
    monkeypatch, device: str, dtype: torch.dtype, length: int, heads: int, size: int, every: int
) -> None:
    """Output, states and every gradient of two rows with documents, of heads and states of that size."""
    from megatron_taipan.ops import ssd_backward_triton as backward
    from megatron_taipan.ops import ssd_forward_triton as forward

    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    joined = numbers(2, length, heads * size + 2 * size)  # as the convolution leaves them
    x, B, C = joined.split([heads * size, size, size], -1)
    x, B, C = x.unflatten(-1, (heads, size)), B.unflatten(-1, (1, size)), C.unflatten(-1, (1, size))
    dy, dt = numbers(2, length, heads, size), numbers(2, length, heads)
    A, D, bias = (
        -torch.ones(heads, device=device),
        numbers(heads, dtype=torch.float32),
        torch.zeros(heads, device=device),
    )
    seq_idx = (torch.rand(2, length, generator=generator) < 0.01).cumsum(1).int().to(device)

    def run() -> list[torch.Tensor]:
        decays = forward.prepare_decay(dt, bias, A, seq_idx)
        y, kept, final = forward.scan_forward(x, decays, B, C, D, None, keep=every)
        if not every:
            return [y, final]
        states = kept if every == 1 else forward.scan_states(x, decays, B, kept, every)
        dx, dB, dC, ddt = (torch.empty(t.shape, dtype=dtype, device=device) for t in (x, B, C, dt))
        sums, initial = backward.scan_backward(
            dy, x, decays, A, B, C, D, states, None, dx=dx, ddt=ddt, dB=dB, dC=dC, softplus=True
        )
        return [y, final, states, dx, dB, dC, ddt, sums, initial]

    asked = []
    tiled = forward.tiled

    def by_engine(*tensors: torch.Tensor) -> bool:
        asked.append(tiled(*tensors))
        return asked[-1]

    for module in (forward, backward):
        monkeypatch.setattr(module, "tiled", by_engine)
    with_engine = run()
    assert all(asked) and asked
    for module in (forward, backward):
        monkeypatch.setattr(module, "tiled", lambda *_: False)
    without = run()
    assert [error(a, b) for a, b in zip(with_engine, without, strict=True)] == [0.0] * len(without)
