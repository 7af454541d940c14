"""The wrappers of other projects' kernels, on stand-ins that compute slowly and accept no more than the real ones."""

import pytest
import torch

from megatron_taipan.ops.attention_flash import Boundaries
from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from megatron_taipan.ops.causal_conv1d_cuda import load_causal_conv1d_cuda
from tests.ops import fake_libraries
from tests.ops.library_cases import check_attention, check_conv, check_cross_entropy, check_scan

CPU = ("cpu", torch.float64, 1e-9)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    fake_libraries.install(monkeypatch)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_scan(packed, state, groups):
    check_scan(
        *CPU, l=70, packed=packed, state=state, groups=groups, heads=4, headdim=3, d_state=5, chunk_size=16
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("extra", [0, 3], ids=["aligned", "copied"])
def test_conv(packed, tail, extra):
    check_conv(*CPU, l=70, packed=packed, tail=tail, extra=extra, bias=not extra, width=3 if tail else 4)


def test_conv_copies_what_begins_at_an_unaligned_address():
    x, weight = torch.randn(2 * 7 * 24 + 1)[1:].view(2, 7, 24), torch.randn(24, 4)
    assert x.is_contiguous()
    found = load_causal_conv1d_cuda()[0](x, weight)
    torch.testing.assert_close(found, causal_conv1d_reference(x, weight))


def test_conv_keeps_a_tail_of_rows_shorter_than_it():
    check_conv(*CPU, l=2, packed=False, tail=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_flash_attention(packed, window):
    check_attention("flash_attn", *CPU, l=70, packed=packed, window=window, head_dim=8)


def test_sdpa():
    check_attention("sdpa", *CPU, l=70, packed=False, window=None, head_dim=8)


@pytest.mark.parametrize("choice", ["liger", "cce"])
def test_cross_entropy(choice):
    check_cross_entropy(choice, "cpu", torch.float64, 1e-6, n=13, vocab=11)  # token weights are float32


def test_documents_are_read_once_a_pass_and_again_for_the_next():
    boundaries = Boundaries()
    first, second = torch.tensor([[0, 0, 2], [0, 1, 1]]), torch.tensor([[0, 1, 2], [0, 0, 0]])
    found = boundaries(first)
    assert found.tolist() == [0, 2, 3, 4, 6] and boundaries(first) is found
    assert boundaries(second).tolist() == [0, 1, 2, 3, 6]
    del first
    assert boundaries(second).tolist() == [0, 1, 2, 3, 6]
