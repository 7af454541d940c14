"""The program as a user starts it."""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, suppress
from pathlib import Path

import pytest
import torch
import yaml

from megatron_taipan import pretrain
from megatron_taipan.config_loading import load_config
from megatron_taipan.config_text import describe_options
from megatron_taipan.engine.build import check_layout
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.train.dry_run import dry_run
from tests.distributed.launch import ROOT, launch, process_env
from tests.train.toy import toy_tree, write_data

CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
FAMILIES = ("taipan", "samba", "jamba", "mamba2", "transformerpp")
SIZES = {"190m": 188e6, "450m": 446e6, "1.3b": 1295e6}


def run(*command: str, timeout: float = 120) -> subprocess.CompletedProcess:
    env = {
        k: v for k, v in process_env(0, 1, 0).items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    del env["PYTHONPATH"]  # it must find its checkout by itself
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def program(*arguments: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "launch/pretrain.py", *arguments)


def deepspeed(*arguments: str) -> subprocess.CompletedProcess:
    launcher = Path(sys.executable).with_name("deepspeed")
    port = str(20000 + os.getpid() % 20000)
    return run(str(launcher), "--num_gpus", "2", "--master_port", port, "launch/pretrain.py", *arguments)


@pytest.fixture
def config(tmp_path) -> str:
    tree = toy_tree(write_data(tmp_path / "data"), tmp_path / "run")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return str(tmp_path / "config.yaml")


def test_help_lists_every_option_with_meaning_and_default():
    text = " ".join(program("--help").stdout.split())
    for name, default, meaning in describe_options():
        assert f"{name} [{default}]" in text, name
        assert " ".join(meaning.split()) in text, name


def test_the_program_runs_the_package_beside_it_though_another_checkout_is_installed(tmp_path):
    (tmp_path / "megatron_taipan").mkdir()
    (tmp_path / "megatron_taipan" / "__init__.py").write_text("raise SystemExit('the other one')")
    command = [sys.executable, ROOT / "launch/pretrain.py", "--help"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    finished = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


def test_dry_run_says_parameters_layout_and_steps(config):
    finished = program("--config", config, "--dry-run", "--processes", "4")
    assert finished.returncode == 0, finished.stderr
    assert "4 data x 1 tensor x 1 pipeline" in finished.stdout
    assert "6 steps = 1,536 tokens" in finished.stdout
    assert "1 micro-batches of 2 on each of 4 data-parallel ranks" in finished.stdout
    assert f"sources    {Path(config).parent / 'data'}, 0." in finished.stdout
    unchecked = program("--config", config, "--dry-run", "data.verify=true")
    assert unchecked.returncode == 2 and "has no checksum" in unchecked.stderr


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern, first_of_last", [("M S | M A", 2), ("M | S M A", 1), ("M S M | A", 3)])
def test_dry_run_counts_the_parameters_of_one_pipeline_stage(config, pattern, first_of_last, tied):
    options = ["parallel.pipeline=2", f"model.pattern={pattern}", f"model.tie_embeddings={tied}"]
    stages = [0, 0]
    for name, parameter in Taipan(load_config(config, options).model).named_parameters():
        part, number, *_ = name.split(".")
        late = int(number) >= first_of_last if part == "layers" else part != "embedding"
        stages[late] += parameter.numel()
        stages[1] += parameter.numel() if part == "embedding" and tied else 0
    line = next(line for line in dry_run(load_config(config, options), 2) if line.startswith("per rank"))
    assert f"at most {max(stages):,} parameters" in line


@pytest.mark.parametrize(
    ("stage", "precision", "context", "bytes_of_each"),
    [
        # ZeRO's table (arXiv 1910.02054, figure 1) with float32 gradients: parameters, gradients, master and moments
        (0, "fp32", 1, 4 + 4 + 8),  # the parameters are the master
        (1, "bf16", 1, 2 + 4 + 12 / 4),
        (2, "bf16", 1, 2 + 4 / 4 + 12 / 4),
        (3, "bf16", 1, 2 / 4 + 4 / 4 + 12 / 4),
        (1, "fp32", 1, 4 + 4 + 12 / 4),
        (1, "bf16", 2, 2 + 4 + 12 / 4),  # ranks with other pieces of the same rows have the same parameters
    ],
)
def test_dry_run_counts_the_bytes_of_the_state(config, stage, precision, context, bytes_of_each):
    options = [f"parallel.zero_stage={stage}", f"train.precision={precision}", f"parallel.context={context}"]
    options += ["model.vocab_size=400000", "model.d_model=256"]
    line = next(line for line in dry_run(load_config(config, options), 4) if line.startswith("per rank"))
    count, size = re.search(r"([\d,]+) parameters; .* state ([\d.]+) GB", line).groups()
    assert float(size) == pytest.approx(int(count.replace(",", "")) * bytes_of_each / 1e9, abs=0.005)


def test_dry_run_counts_one_moment_of_what_muon_steps(config):
    options = ["optim.name=muon", "train.precision=bf16", "model.d_model=1024", "model.d_ff=4096"]
    settings = load_config(config, options)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Taipan(settings.model).named_parameters()}
    matrices = sum(size for name, size in sizes.items() if re.search(r"_proj(_\w+)?$", name))
    wanted = (2 + 4) * sum(sizes.values()) + (12 * sum(sizes.values()) - 4 * matrices) / 4
    line = next(line for line in dry_run(settings, 4) if line.startswith("per rank"))
    assert float(re.search(r" state ([\d.]+) GB", line)[1]) == pytest.approx(wanted / 1e9, abs=0.005)
    assert matrices / 1e9 > 0.02  # so that a second moment would show


def test_overrides_may_stand_on_both_sides_of_an_option(config):
    finished = program("train.steps=7", "--config", config, "--dry-run", "train.micro_batch=1", "--processes", "4",
                       "train.global_batch=4")  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "7 steps = " in finished.stdout and "4 samples x " in finished.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train.stepz=3"], ["train.stepz", "train.steps"]),
        (["parallel.tensor=2"], ["1 processes", "parallel.tensor=2"]),
        (["parallel.tensor=3", "--processes", "3"], ["parallel.tensor=3", "SSM heads=4"]),
        (["--processes", "3"], ["train.global_batch=8", "remainder 2"]),
        (["--processes", "0"], ["0 processes"]),
        (["--processes", "-2"], ["-2 processes"]),
        (["model.vocab_size=40"], ["vocab", "40"]),
        (["data.train=nowhere/x"], ["nowhere/x"]),
        (["parallel.offload_param=cpu"], ["zero_stage=3"]),
        (["parallel.zero_stage=0", "train.precision=bf16"], ["zero_stage=0"]),
        (["checkpoint.dir=~/runs"], ["checkpoint.dir=~/runs", '"$HOME/..."']),
    ],
)
def test_bad_input_is_one_line_and_status_2(config, arguments, words):
    finished = program("--config", config, "--dry-run", *arguments)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("error: ")
    assert all(word in finished.stderr for word in words), finished.stderr


@pytest.mark.parametrize(
    ("processes", "arguments", "message"),
    [
        (3, ["parallel.context=3"], "data.seq_len=32 is not a multiple of parallel.context=3 (remainder 2); take 30"),
        (16, ["parallel.context=16"], "data.seq_len=32 / parallel.context=16 = 2 tokens is shorter than the 3 inputs"),
        (4, ["parallel.context=2", "parallel.pipeline=2"], "parallel.context=2 needs parallel.pipeline=1, not 2"),
        (12, ["parallel.context=8"], "12 processes cannot hold parallel.tensor=1 x parallel.context=8"),
    ],
)
def test_rows_that_cannot_be_cut_into_pieces_are_refused_by_the_dry_run(config, processes, arguments, message, capsys):
    assert pretrain.main(["--config", config, "--dry-run", "--processes", str(processes), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_dry_run_says_what_pieces_of_rows_send(config, capsys):
    options = ["parallel.context=4", "--processes", "8", "train.micro_batch=1"]
    assert pretrain.main(["--config", config, "--dry-run", *options]) == 0
    lines = capsys.readouterr().out
    assert "8 processes = 2 data x 4 context x 1 tensor x 1 pipeline" in lines
    assert "4 micro-batches of 1 on each of 2 data-parallel ranks" in lines
    assert "pieces     rows of 32 tokens in 4 pieces of 8; a rank sends at most" in lines


def test_missing_file_and_missing_option():
    assert "no.yaml" in program("--config", "no.yaml").stderr
    assert program().returncode == 2


@pytest.mark.parametrize(
    "arguments, word", [(["train.micro_batch=8"], "remainder 8"), (["model.vocab_size=40"], "vocab")]
)
def test_under_the_launcher_an_error_is_printed_once_and_the_job_fails(config, arguments, word):
    """One that is found before the processes join, and one after."""
    finished = deepspeed("--config", config, *arguments)
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if line.startswith("error")]
    assert len(lines) == 1 and word in lines[0], finished.stderr
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    assert not (Path(config).parent / "run").exists()


def bad_sample_on_rank_1(config: str) -> tuple[int | None, str]:
    """The program in this process; on rank 1 the second step's data turn out to be bad. Exit status and stderr."""
    from megatron_taipan import pretrain
    from megatron_taipan.data.loader import SampleDataset
    from megatron_taipan.errors import UserError

    def batch(dataset: SampleDataset, indices: list[int]) -> dict:
        if os.environ["RANK"] == "1" and indices[0] >= 8:
            raise UserError("id 70 is beyond the vocabulary")
        return read(dataset, indices)

    read, SampleDataset.batch = SampleDataset.batch, batch
    status = None
    with tempfile.TemporaryFile("w+") as said:
        with redirect_stderr(said), suppress(RuntimeError):  # rank 0 loses its neighbour
            status = pretrain.main(["--config", config])
        said.seek(0)
        return status, said.read()


def test_an_error_that_one_rank_alone_finds_is_said_by_it(config):
    _, (status, stderr) = launch(2, bad_sample_on_rank_1, config, join=False)
    assert status == 2
    assert "error on rank 1: id 70 is beyond the vocabulary" in stderr


def test_trains_under_the_launcher(config):
    finished = deepspeed("--config", config, "train.steps=2")
    assert finished.returncode == 0, finished.stderr
    assert (Path(config).parent / "run" / "step_00000002" / "manifest.json").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_presets_fit_common_layouts(path):
    config = load_config(path)
    for processes in (1, 2) if path.stem == "quickstart" else (1, 8, 16):
        check_layout(config, processes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_presets_of_one_size_share_recipe_and_size(family, size):
    ours, taipan = (load_config(ROOT / "launch" / "configs" / f"{name}_{size}.yaml") for name in (family, "taipan"))
    for section in ("data", "optim", "train", "parallel", "ops"):
        assert getattr(ours, section) == getattr(taipan, section), section
    from megatron_taipan.parameters import parameter_table

    count = sum(torch_numel(spec.shape) for spec in parameter_table(ours.model).values())
    assert count == pytest.approx(SIZES[size], rel=0.02)
    assert ours.train.global_batch * ours.data.seq_len == 2**19
    assert (ours.optim.lr, ours.optim.min_lr, ours.optim.warmup_steps) == (5e-4, 1e-5, 2000)
    assert (ours.optim.weight_decay, ours.optim.grad_clip) == (0.01, 1.0)
    tokens = {"190m": 27e9}.get(size, 100e9)
    assert ours.train.steps * 2**19 == pytest.approx(tokens, rel=1e-3)


def torch_numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def test_a_missing_package_is_wrong_input():
    """The batch script starts a job anew on most statuses, and the package would be missing again."""
    command = [sys.executable, "-S", "launch/pretrain.py", "--config", "my.yaml"]  # -S: no site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "ModuleNotFoundError" in done.stderr and "make venv" in done.stderr.splitlines()[-1]
