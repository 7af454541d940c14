"""Which implementation an option picks, what overrides what, and the words of each refusal."""

import dataclasses
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from megatron_taipan.errors import UserError
from megatron_taipan.ops import dispatch
from megatron_taipan.ops.choices import FOREIGN, OPTIONS, RunFacts, check_choices
from megatron_taipan.ops.dispatch import pick_ops
from megatron_taipan.ops.fast import FUSIONS
from megatron_taipan.ops.libraries import LIBRARIES
from megatron_taipan.ops.operations import REFERENCES
from tests.ops import fake_libraries

A = {"A": False}
ALL = [(option, choice) for option, known in FOREIGN.items() for choice in known]


@pytest.fixture
def kernels(monkeypatch) -> dict:
    """A GPU, a kernel of ours for every operation, and every package."""
    fake_libraries.install(monkeypatch)
    made = {name: lambda *args, **options: "ours" for name in (*REFERENCES, "gate_scores")}
    monkeypatch.setattr(dispatch, "FAST", {name: ("triton", lambda f=f: f) for name, f in made.items()})
    for name, (_, parts) in FUSIONS.items():
        monkeypatch.setitem(FUSIONS, name, (lambda: lambda *args, **options: "in one", parts))
    return made


def labels(ops) -> dict[str, str]:
    """By operation, from the report."""
    words = ops.report.removeprefix("ops: ").split("=")
    names = [words[0], *(word.rsplit(" ", 1)[1] for word in words[1:-1])]
    return dict(zip(names, [*(word.rsplit(" ", 1)[0] for word in words[1:-1]), words[-1]], strict=True))


def test_every_operation_is_under_one_option_and_every_option_in_the_configuration():
    from megatron_taipan.ops_config import OpsConfig

    under = [name for names in OPTIONS.values() for name in names]
    assert sorted(under) == sorted([*REFERENCES, "gate_scores"])  # the gate itself has the one of that
    assert OpsConfig().choices() == dict.fromkeys(OPTIONS, "auto")
    for option in OPTIONS:
        known = set(OpsConfig.model_fields[option].annotation.__args__)
        assert known == {"auto", "triton", "reference", *FOREIGN.get(option, ())}


@pytest.mark.parametrize(
    ("backend", "others"), [("auto", "triton"), ("fast", "triton"), ("reference", "reference (asked for)")]
)
def test_an_operations_own_option_overrides_the_backend(kernels, backend, others):
    found = labels(pick_ops(backend, {"ssd": "mamba_ssm", "norm": "reference", "swiglu": "triton", "conv": "auto"}))
    assert found["ssd"] == "mamba_ssm 2.3.2.post1" and found["ssd_update"] == others
    assert found["rms_norm"] == found["add_rms_norm"] == "reference (asked for)"
    assert found["silu_mul"] == "triton" and found["causal_conv1d"] == found["interval_attention"] == others


def test_without_options_everything_is_as_the_backend_says(kernels):
    found = labels(pick_ops("auto"))
    fused = {found.pop(name) for name in FUSIONS}
    assert set(found.values()) == {"triton"} and "triton (causal_conv1d, ssd, gated_rms_norm in one)" in fused
    assert all(label.startswith("triton (") for label in fused)
    assert set(labels(pick_ops("reference")).values()) == {"reference (asked for)", "none (its parts one by one)"}
    assert pick_ops("auto").causal_attention is None and not pick_ops("auto").unrecordable


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        ({"ssd": "mamba_ssm"}, {"mamba2_mix"}), ({"conv": "causal_conv1d"}, {"mamba2_mix"}),
        ({"conv": "reference"}, {"mamba2_mix"}), ({"gated_norm": "reference"}, {"mamba2_mix"}),
        ({"norm": "reference"}, {"add_norm_linear", "add_norm_swiglu"}), ({"swiglu": "reference"}, {"add_norm_swiglu"}),
        ({"selection": "reference"}, {"every_query"}), ({"attention": "reference"}, {"every_query"}),
    ],
    ids=str,
)  # fmt: skip
def test_fused_operations_run_where_all_their_parts_are_ours(kernels, choices, names):
    assert all(getattr(pick_ops("auto"), name) is not None for name in FUSIONS)
    ops = pick_ops("auto", choices)
    assert names == {name for name in FUSIONS if getattr(ops, name) is None}
    assert all(f"{name}=none" in ops.report for name in names)


def test_the_gates_kernel_follows_its_option(kernels):
    assert pick_ops("auto").gate_scores is not None and pick_ops("reference").gate_scores is None
    ops = pick_ops("auto", {"gate": "reference"})
    assert ops.gate_scores is None and labels(ops)["gate_scores"] == "reference (asked for)"
    assert pick_ops("reference", {"gate": "triton"}).gate_scores is not None


@pytest.mark.parametrize(("option", "choice"), ALL)
def test_another_projects_kernel_is_named_with_its_version_and_called(kernels, option, choice, monkeypatch):
    monkeypatch.setattr(dispatch, "takes_kernels", lambda x: True)
    name = FOREIGN[option][choice].operation
    called = dataclasses.replace(FOREIGN[option][choice], load=lambda run: (lambda *args: "theirs", "1.2"))
    monkeypatch.setitem(FOREIGN[option], choice, called)
    ops = pick_ops("auto", {option: choice}, RunFacts(every_query={"A": False}))
    assert labels(ops)[name] == f"{choice} 1.2" and getattr(ops, name)(torch.ones(2)) == "theirs"
    assert (name in ops.kernels) == (name in REFERENCES)


def test_tensors_on_a_cpu_take_the_reference_as_ever(kernels):
    x, weight = torch.randn(2, 5, 8), torch.randn(8, 4)
    conv = pick_ops("auto", {"conv": "causal_conv1d"}).causal_conv1d
    assert torch.equal(conv(x, weight), REFERENCES["causal_conv1d"](x, weight))


@pytest.mark.parametrize(
    ("choices", "most"),
    [({"ssd": "mamba_ssm"}, {"scan_elements": 2**31}), ({"conv": "causal_conv1d"}, {"conv_elements": 2**32})],
    ids=str,
)
def test_micro_batches_beyond_the_offsets_of_a_kernel_are_refused(choices, most):
    check_choices(choices, RunFacts(**most))
    with pytest.raises(UserError, match=r"offsets take 3\d bits.* and a micro-batch has [\d,]*\d on a rank"):
        check_choices(choices, RunFacts(**{name: n + 1 for name, n in most.items()}))
    check_choices({"ssd": "triton", "conv": "triton"}, RunFacts(scan_elements=2**40, conv_elements=2**40))


@pytest.mark.parametrize(("option", "choice"), ALL)
def test_without_a_gpu_it_is_refused(option, choice, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"ops\.{option}={choice} runs on an NVIDIA GPU.*use ops\.{option}=auto"):
        pick_ops("auto", {option: choice}, RunFacts(every_query={"A": False}))


def test_triton_is_refused_where_its_kernel_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"ops\.gated_norm=triton.*gated_rms_norm.*no CUDA"):
        pick_ops("auto", {"gated_norm": "triton"})
    assert "gated_rms_norm=reference (asked for)" in pick_ops("auto", {"gated_norm": "reference"}).report


@pytest.mark.parametrize("backend", ["auto", "fast"])
def test_auto_takes_cudnn_where_rows_are_whole_and_it_can_serve_the_run(kernels, monkeypatch, backend):
    def taken(choices=None, **facts) -> str | None:
        return labels(pick_ops(backend, choices, RunFacts(**({"every_query": A} | facts)))).get("causal_attention")

    assert taken() == taken({"attention": "auto"}) == taken(gated=("S",)) == f"sdpa {torch.__version__}"
    assert taken({"attention": "triton"}) is None and taken({"attention": "flash_attn"}).startswith("flash_attn")
    for facts in (
        {"packed": True}, {"every_query": A | {"W": True}}, {"every_query": {}}, {"precision": "fp32"},
        {"deterministic": True}, {"head_dim": 256}, {"head_dim": 100}, {"in_pieces": True},
    ):  # fmt: skip
        assert taken(**facts) is None, facts
    assert pick_ops(backend).causal_attention is None  # where nothing is known of the run
    assert pick_ops("reference", None, RunFacts(every_query=A)).causal_attention is None
    for owner, name, value in (
        (torch.backends.cuda, "cudnn_sdp_enabled", False), (torch.backends.cudnn, "is_available", False),
        (torch.cuda, "get_device_capability", (8, 0)), (torch.cuda, "is_available", False),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_, value=value: value)
            assert labels(pick_ops("auto", None, RunFacts(every_query=A))).get("causal_attention") is None


def test_fast_does_not_ask_for_kernels_that_an_option_replaced(kernels, monkeypatch):
    def lacks():
        raise ImportError("no compiler")

    monkeypatch.setitem(dispatch.FAST, "ssd", ("triton", lacks))
    monkeypatch.setitem(dispatch.FAST, "silu_mul", ("triton", lacks))
    with pytest.raises(UserError, match="ssd: reference .no compiler.; silu_mul"):
        pick_ops("fast")
    found = labels(pick_ops("fast", {"ssd": "mamba_ssm", "swiglu": "reference"}))
    assert found["ssd"] == "mamba_ssm 2.3.2.post1"


def test_the_extra_gpu_asks_for_the_releases_that_the_wrappers_need():
    setup = (Path(__file__).resolve().parents[2] / "setup.py").read_text()
    assert all(f'"{library.package}>={library.oldest}"' in setup for library in LIBRARIES.values())


PACKAGES = [(option, choice) for option, choice in ALL if choice != "sdpa"]


@pytest.mark.parametrize(("option", "choice"), PACKAGES)
def test_a_package_that_is_missing_old_or_broken_is_named_with_its_command(option, choice, monkeypatch):
    library = LIBRARIES[choice]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    build = "--no-build-isolation " if choice in ("mamba_ssm", "causal_conv1d", "flash_attn") else ""
    command = rf"pip install {build}'{library.package}>={library.oldest}'"

    def refusal(version) -> str:
        def found(package: str) -> str:
            assert package == library.package
            if version is None:
                raise metadata.PackageNotFoundError
            return version

        with monkeypatch.context() as patch:
            patch.setattr(metadata, "version", found)
            for module in ("mamba_ssm", "causal_conv1d", "flash_attn", "liger_kernel", "cut_cross_entropy"):
                patch.setitem(sys.modules, module, None)  # `import` of it fails
            with pytest.raises(UserError) as error:
                pick_ops("auto", {option: choice}, RunFacts(every_query={"A": False}))
        return str(error.value)

    for version, words in ((None, "it is not installed"), ("0.1", "0.1 is installed"), ("99.1", "does not import")):
        text = refusal(version)
        assert text.startswith(f"ops.{option}={choice} needs the package {library.package} {library.oldest} or later")
        assert words in text and command in text and "\n" not in text


def test_flash_attention_names_a_gpu_that_is_too_old(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    with pytest.raises(UserError, match=r"compute capability 8\.0.*Tesla T4 has 7\.5"):
        pick_ops("auto", {"attention": "flash_attn"}, RunFacts(every_query={"A": False}))


@pytest.mark.parametrize(
    ("option", "choice", "facts", "words"),
    [
        ("ssd", "mamba_ssm", {"precision": "fp32", "tf32": False}, "TF32.*train.tf32=false"),
        ("ssd", "triton", {"d_state": 96}, "powers of two.*64 and 96"),
        ("conv", "causal_conv1d", {"d_conv": 5}, "width 2 to 4, not model.mamba.d_conv=5"),
        ("conv", "causal_conv1d", {"conv_channels": 2052}, r"2052 channels.*multiple of 8 \(remainder 4\)"),
        ("conv", "triton", {"d_conv": 5}, "width up to 4"),
        ("attention", "flash_attn", {"precision": "fp32", "every_query": A}, "bf16 and fp16, not train.precision=fp32"),
        ("attention", "flash_attn", {"head_dim": 512, "every_query": A}, "up to 256 channels, not 512"),
        ("attention", "flash_attn", {"gated": ("S",)}, "from every token, and layers S from selected"),
        ("attention", "sdpa", {"gated": ("S",)}, "from every token, and layers S from selected"),
        ("attention", "sdpa", {"every_query": {"A": False, "W": True}}, "no sliding window, and layers W have one"),
        ("attention", "sdpa", {"every_query": A, "packed": True}, "one_document=true or data.mask_documents=false"),
        ("attention", "triton", {"head_dim": 96}, "power of two from 16 to 128 channels, not 96"),
        ("cross_entropy", "liger", {"tensor": 2}, "split over parallel.tensor=2 ranks"),
        ("cross_entropy", "cce", {"tensor": 4}, "split over parallel.tensor=4 ranks"),
        ("cross_entropy", "cce", {"precision": "fp32"}, "bf16 and fp16, not train.precision=fp32"),
        ("cross_entropy", "cce", {"deterministic": True}, "train.deterministic=true"),
    ],
)  # fmt: skip
def test_what_a_library_cannot_do_is_refused_with_the_reason(option, choice, facts, words):
    with pytest.raises(UserError, match=rf"ops\.{option}={choice} cannot serve this run: .*{words}"):
        check_choices({option: choice}, RunFacts(**facts))
    check_choices({option: choice}, RunFacts(every_query=A))


def test_every_reason_is_given_at_once():
    run = RunFacts(precision="fp32", tensor=2)
    with pytest.raises(UserError, match="ops.cross_entropy=cce.*2 ranks.*; ops.cross_entropy=cce.*fp32"):
        check_choices({"cross_entropy": "cce", "ssd": "mamba_ssm"}, run)


def test_graphs_cannot_hold_what_the_host_has_to_read(kernels):
    whole, packed = (
        pick_ops("auto", {"attention": "flash_attn"}, RunFacts(every_query=A, packed=packed))
        for packed in (False, True)
    )
    assert not whole.unrecordable and packed.unrecordable == "flash_attn counts packed documents on the host"
