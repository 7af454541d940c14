"""Other projects' kernels behind our interfaces against the references in float64, on the GPU they are made for.

A package that is not installed skips its tests.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_taipan.errors import UserError
from megatron_taipan.ops.libraries import LIBRARIES
from tests.ops.kernel_checks import TOLERANCE
from tests.ops.library_cases import check_attention, check_conv, check_cross_entropy, check_scan, loaded

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def require(option: str, choice: str, **facts):
    """The kernel, or a skip that says what is missing; a package that is there and does not import is a failure."""
    try:
        return loaded(option, choice, **facts)
    except UserError as error:
        if choice in LIBRARIES and "is not installed" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def one_candidate(monkeypatch):
    """Autotuned kernels take their last candidate, the smallest: compiling and timing all of them takes half a minute a
    case, and which one is chosen is not what is tested."""
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    monkeypatch.setattr(autotuner.Autotuner, "prune_configs", lambda self, kwargs: self.configs[-1:])


# Twice the limit of our own kernels for what rounds more than they do: mamba_ssm keeps its states between chunks in 16
# bits, and multiplies float32 as TF32.
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "l", "sizes"),
    [
        (BF16, 4e-2, 517, {}),
        (BF16, 4e-2, 1300, {"heads": 8, "groups": 2, "d_state": 64}),
        (BF16, 4e-2, 100, {"chunk_size": 64}),  # shorter than two chunks, and not a multiple
        (FP16, 1e-2, 517, {"headdim": 32, "d_state": 16}),
        (FP32, 5e-3, 300, {"headdim": 32, "d_state": 64}),
    ],
)
def test_mamba_ssm(dtype, tolerance, l, sizes, packed, state, one_candidate):
    require("ssd", "mamba_ssm")
    torch.manual_seed(0)
    check_scan("cuda", dtype, tolerance, l=l, packed=packed, state=state, **sizes)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("extra", [0, 3], ids=["aligned", "copied"])
@pytest.mark.parametrize(
    ("dtype", "width", "bias"), [(BF16, 4, True), (BF16, 4, False), (FP16, 3, True), (FP32, 2, True)]
)
def test_causal_conv1d(dtype, width, bias, extra, tail, packed):
    require("conv", "causal_conv1d")
    torch.manual_seed(0)
    check_conv("cuda", dtype, TOLERANCE[dtype], l=517, packed=packed, tail=tail, bias=bias, width=width, extra=extra)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 100, 4096])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "kv_heads"), [(BF16, 128, 4), (BF16, 64, 1), (FP16, 64, 2), (BF16, 96, 4)]
)
def test_flash_attn(dtype, head_dim, kv_heads, window, packed):
    require("attention", "flash_attn")
    torch.manual_seed(0)
    check_attention(
        "flash_attn", "cuda", dtype, TOLERANCE[dtype], l=517, packed=packed, window=window, head_dim=head_dim,
        kv_heads=kv_heads,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "head_dim", "kv_heads"), [(BF16, 128, 4), (BF16, 64, 1), (FP16, 64, 2), (FP32, 64, 4)]
)
def test_sdpa(dtype, head_dim, kv_heads):
    torch.manual_seed(0)
    check_attention(
        "sdpa", "cuda", dtype, TOLERANCE[dtype], l=517, packed=False, window=None, head_dim=head_dim, kv_heads=kv_heads
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "n"), [(BF16, 701), (FP16, 701), (FP32, 130)])
def test_liger(dtype, n):
    require("cross_entropy", "liger")
    torch.manual_seed(0)
    check_cross_entropy("liger", "cuda", dtype, TOLERANCE[dtype], n=n, vocab=5000)


@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 4e-2), (FP16, 6e-3)])  # it adds gradients up in 16 bits
def test_cut_cross_entropy(dtype, tolerance):
    require("cross_entropy", "cce")
    torch.manual_seed(0)
    check_cross_entropy("cce", "cuda", dtype, tolerance, n=701, vocab=5000)


CAPTURED = [("ssd", "mamba_ssm"), ("conv", "causal_conv1d"), ("attention", "flash_attn"), ("attention", "sdpa")]


@pytest.mark.parametrize(("option", "choice"), CAPTURED)
def test_cuda_graphs_hold_it(option, choice, one_candidate):
    """Forward and backward pass recorded once and replayed on other values: as running it, bit for bit or nearly."""
    kernel = require(option, choice, packed=False)
    b, l, h, d = 2, 256, 4, 64
    seq_idx = (torch.arange(l, device="cuda") > 99).int().expand(b, l).contiguous()
    start = torch.zeros(b, l, dtype=torch.long, device="cuda")
    calls = {
        "ssd": (
            lambda x, dt, A, B, C: kernel(x, dt.sigmoid(), -A.exp(), B, C, chunk_size=128, seq_idx=seq_idx),
            [(b, l, h, d), (b, l, h), (h,), (b, l, 1, d), (b, l, 1, d)],
        ),
        "conv": (lambda x, w, bias: kernel(x, w, bias, seq_idx=seq_idx), [(b, l, h * d), (h * d, 4), (h * d,)]),
        "attention": (lambda q, k, v: kernel(q, k, v, start, None), [(b * l, h, d)] * 3),
    }
    run, shapes = calls[option]

    def values(seed: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(seed)
        wide = {(b, l, h), (h,)}
        made = [torch.randn(s, device="cuda", dtype=FP32 if s in wide else BF16) for s in shapes]
        return tuple(t.requires_grad_() for t in made)

    recorded = torch.cuda.make_graphed_callables(run, values(0))
    inputs, same = values(1), values(1)
    upstream = torch.randn_like(run(*same))
    got, expected = recorded(*inputs), run(*same)
    grads = torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, same, upstream)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    for a, c in zip(*grads, strict=True):
        assert (a - c).norm() <= 1e-2 * c.norm()  # sums by atomic additions vary


@pytest.mark.parametrize(
    ("pattern", "overrides", "recorded"),
    [
        ("M W M A", ["ops.ssd=mamba_ssm", "ops.conv=causal_conv1d", "ops.attention=flash_attn"], False),
        ("M W M A", ["ops.attention=flash_attn", "data.mask_documents=false"], True),
        ("M S M A", ["ops.attention=sdpa", "data.mask_documents=false", "ops.cross_entropy=liger"], True),
        ("M S", ["ops.ssd=mamba_ssm", "ops.conv=causal_conv1d", "ops.cross_entropy=cce"], True),
    ],
)
def test_a_run_learns_as_with_our_kernels(tmp_path, pattern, overrides, recorded):
    """launch/pretrain.py in bf16, ten steps; the log's line says what ran. Ours by name, since `auto` may take sdpa."""
    from megatron_taipan.ops.choices import FOREIGN
    from tests.train.toy import write_data

    asked = [text.removeprefix("ops.").split("=") for text in overrides if text.startswith("ops.")]
    for option, choice in asked:
        if choice in FOREIGN.get(option, {}):
            require(option, choice)
    prefix = write_data(tmp_path / "data", documents=600)

    def losses(name: str, extra: list[str]) -> tuple[list[float], str]:
        options = [
            f"model.pattern={pattern}", "model.vocab_size=64", "model.d_model=128", "model.d_ff=256",
            "model.attention.n_heads=2", "model.attention.window=24", "model.mamba.headdim=32",
            "model.mamba.d_state=32",
            f"data.train={prefix}", "data.seq_len=128", "train.steps=10", "train.global_batch=8", "train.micro_batch=8",
            "train.eval_every=0", "train.eval_samples=8", "train.precision=bf16", "optim.warmup_steps=2",
            f"checkpoint.dir={tmp_path / name}", "checkpoint.save_every=0", "log.every=1", "log.tensorboard=false",
            "data.tokenizer=null", "data.valid_fraction=0",
        ]  # fmt: skip
        command = [
            sys.executable,
            "launch/pretrain.py",
            "--config",
            "launch/configs/taipan_190m.yaml",
            *options,
            *extra,
        ]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        records = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        start = next(r["text"] if "text" in r else json.dumps(r) for r in records if r["event"] == "start")
        return [r["ce"] for r in records if r["event"] == "step"], start

    theirs, said = losses("theirs", overrides)
    by_name = [text for text in overrides if text.startswith("data.")] + [f"ops.{option}=triton" for option, _ in asked]
    ours, said_of_ours = losses("ours", by_name)
    assert all(f"{choice} " in said and f"{choice} " not in said_of_ours for _, choice in asked), said_of_ours
    assert ("CUDA graphs" in said) == recorded, said
    assert theirs == pytest.approx(ours, rel=2e-2)
