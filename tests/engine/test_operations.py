"""The operations of a configured run: what it needs of them, when it is refused, and what is printed."""

import re
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import yaml

from megatron_taipan.checkpoint.metadata import changed_settings, identity
from megatron_taipan.engine.build import capture_graphs, check_layout
from megatron_taipan.engine.operations import choose_operations, describe_operations, run_facts
from megatron_taipan.errors import UserError
from megatron_taipan.model import attention
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops import dispatch
from megatron_taipan.ops.choices import RunFacts
from tests.ops import fake_libraries
from tests.train.toy import toy_config

MAMBA = {"d_state": 16, "headdim": 16, "n_groups": 2}


def config(pattern="M S M A", **sections):
    model = {"pattern": pattern, "vocab_size": 64, "d_model": 32, "d_ff": 48, "mamba": MAMBA}
    return toy_config("unused", model=model | {"attention": {"n_heads": 2, "window": 12}}, **sections)


def test_the_facts_of_a_run():
    facts = run_facts(config(train={"precision": "bf16"}))
    assert facts == RunFacts(
        packed=True, headdim=16, d_state=16, conv_channels=64 + 2 * 2 * 16, head_dim=16, every_query={"A": False},
        gated=("S",), conv_elements=2 * 32 * (2 * 64 + 2 * 2 * 16 + 4), scan_elements=2 * 32 * 2 * 256,
    )  # fmt: skip
    assert run_facts(config("W M")).every_query == {"W": True}
    for data in ({"mask_documents": False}, {"one_document": True}):
        assert not run_facts(config(data={"train": "unused", "seq_len": 32, **data})).packed
    # half of x and, with two groups, one of B and of C; four ranks share a group between two of them
    assert run_facts(config(parallel={"tensor": 2})).conv_channels == 32 + 2 * 16
    assert run_facts(config(parallel={"tensor": 4})).conv_channels == 16 + 2 * 16


def test_a_run_is_refused_before_anything_is_started():
    with pytest.raises(UserError, match="ops.attention=flash_attn cannot serve this run.*precision=fp32"):
        check_layout(config(ops={"attention": "flash_attn"}), 1)
    with pytest.raises(UserError, match="ops.cross_entropy=liger.*parallel.tensor=2"):
        check_layout(config(ops={"cross_entropy": "liger"}, parallel={"tensor": 2}), 2)
    check_layout(config(ops={"cross_entropy": "liger"}), 1)


@pytest.mark.parametrize(("choices", "fits"), [({"ssd": "mamba_ssm"}, 448), ({"conv": "causal_conv1d"}, 480)])
def test_rows_beyond_the_offsets_of_a_kernel_are_refused_before_the_start(choices, fits):
    """taipan_1.3b, whose projections are 8,512 wide and whose convolution has 4,352 channels."""
    model = {"d_model": 2048, "mamba": {"d_state": 128, "headdim": 64}, "vocab_size": 64, "pattern": "M"}

    def long(kib: int, **parallel: int):
        data = {"train": "unused", "seq_len": kib << 10}
        train = {"micro_batch": 1, "global_batch": 1, "precision": "bf16"}
        return toy_config("unused", model=model, data=data, train=train, ops=choices, parallel=parallel)

    check_layout(long(fits), 1)
    with pytest.raises(UserError, match="offsets take .* raise parallel.context"):
        check_layout(long(1024), 1)
    check_layout(long(1024, context=4), 4)


def test_a_later_stage_of_longer_rows_is_what_counts(monkeypatch):
    fake_libraries.install(monkeypatch)
    short, long = (
        config(data={"train": "unused", "seq_len": length}, ops={"ssd": "mamba_ssm"}) for length in (32, 1 << 22)
    )
    choose_operations(short, short)
    with pytest.raises(UserError, match="ops.ssd=mamba_ssm cannot serve this run: its offsets take 31 bits"):
        choose_operations(short, long)


def test_a_dry_run_without_a_gpu_says_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = describe_operations(config(ops={"backend": "fast", "ssd": "mamba_ssm"}))
    assert text.startswith("ops.backend=fast ops.ssd=mamba_ssm (no GPU here")


def test_a_dry_run_on_a_gpu_says_what_runs(monkeypatch):
    fake_libraries.install(monkeypatch)
    text = describe_operations(config(ops={"backend": "reference", "ssd": "mamba_ssm"}))
    assert "ssd=mamba_ssm 2.3.2.post1" in text and "causal_conv1d=reference (asked for)" in text


def test_one_choice_serves_all_stages_of_a_run(monkeypatch):
    """A later stage that packs documents keeps the whole run from attention that cannot tell them apart."""
    fake_libraries.install(monkeypatch)
    whole = config(train={"precision": "bf16"}, data={"train": "unused", "seq_len": 32, "one_document": True})
    packed = config(train={"precision": "bf16"})
    assert choose_operations(whole, whole).causal_attention is not None
    pieces = whole.model_copy(update={"parallel": whole.parallel.model_copy(update={"context": 2})})
    for stages in ((whole, packed), (packed, whole), (whole, pieces)):
        assert choose_operations(*stages).causal_attention is None
        assert "causal_attention" not in describe_operations(*stages)


def test_layers_are_not_recorded_where_the_host_counts_documents(monkeypatch):
    fake_libraries.install(monkeypatch)
    ours = config("A", ops={"attention": "flash_attn"}, train={"precision": "bf16"})
    ops = dispatch.pick_ops("reference", ours.ops.choices(), run_facts(ours))
    said = capture_graphs(Taipan(ours.model, ops=ops), ours, torch.device("cuda"), None)
    assert said == "layers run one by one (flash_attn counts packed documents on the host)"


@pytest.mark.parametrize(
    ("graphs", "micro_batch", "parallel", "recorded"),
    [
        ("auto", 31, {}, True), ("auto", 32, {}, False), (True, 32, {}, True), (False, 1, {}, False),
        ("auto", 32, {"tensor": 2}, True), ("auto", 64, {"tensor": 2}, False),
        ("auto", 32, {"context": 2}, True), ("auto", 64, {"context": 2}, False),
    ],
)  # fmt: skip
def test_layers_are_recorded_where_that_saves_time_or_is_asked_for(graphs, micro_batch, parallel, recorded):
    train = {"precision": "bf16", "cuda_graphs": graphs, "micro_batch": micro_batch, "global_batch": micro_batch}
    ours = config("A", train=train, parallel=parallel, data={"train": "unused", "seq_len": 65_536})
    ours = ours.model_copy(update={"model": ours.model.model_copy(update={"d_model": 64})})
    model = mock.MagicMock(graphable=True, **{"ops.unrecordable": ""})
    with ExitStack() as stack:
        said = capture_graphs(model, ours, torch.device("cuda"), stack)
    assert ("layers run as" in said) == recorded == model.capture.called
    assert recorded or "cuda_graphs" in said


@pytest.mark.parametrize("forbids", ["parallel.zero_stage=2", "train.deterministic=True"])
def test_what_forbids_graphs_is_named_before_what_only_makes_them_useless(forbids):
    """With `true` in place of `auto` there would be none either."""
    section, option, value = re.split("[.=]", forbids)
    options = {"train": {"precision": "bf16", "micro_batch": 32, "global_batch": 32}, "parallel": {}}
    options[section][option] = yaml.safe_load(value)
    ours = config("A", **options, data={"train": "unused", "seq_len": 65_536})
    ours = ours.model_copy(update={"model": ours.model.model_copy(update={"d_model": 64})})
    model = mock.MagicMock(graphable=True, **{"ops.unrecordable": ""})
    with ExitStack() as stack:
        said = capture_graphs(model, ours, torch.device("cuda"), stack)
    assert option in said and not model.capture.called


def test_a_run_goes_on_with_other_kernels_and_says_so():
    saved, ours = config(), config(ops={"ssd": "mamba_ssm"})
    assert identity(saved, "data") == identity(ours, "data")
    assert changed_settings(saved, ours) == ["ops.ssd: auto, this run mamba_ssm"]


LIBRARIES = {"ssd": "mamba_ssm", "conv": "causal_conv1d", "attention": "flash_attn", "cross_entropy": "liger"}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("packed", "attention_by"), [(True, "flash_attn"), (False, "flash_attn"), (False, "sdpa")])
def test_a_network_computes_the_same_with_other_projects_kernels(monkeypatch, packed, attention_by, recompute):
    fake_libraries.install(monkeypatch)
    for module in (dispatch, attention):
        monkeypatch.setattr(module, "takes_kernels", lambda x: True)
    data = {"train": "unused", "seq_len": 32, "mask_documents": packed}
    pattern = "M S M A" if attention_by == "sdpa" else "M W M A"
    ours = config(
        pattern,
        data=data,
        ops=LIBRARIES | {"attention": attention_by},
        train={"precision": "bf16"},
    )
    picked = dispatch.pick_ops("reference", ours.ops.choices(), run_facts(ours))
    made = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (2, 33), generator=made)
    seq_idx = (torch.rand(2, 32, generator=made) < 0.1).cumsum(1).int() if packed else None
    results = []
    for ops in (dispatch.pick_ops("reference"), picked):
        model = Taipan(ours.model, ops=ops, recompute=recompute).double()
        loss = model(tokens[:, :-1], labels=tokens[:, 1:], seq_idx=seq_idx).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
