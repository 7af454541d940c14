"""Perplexity over two ranks, each with a piece of every context, against the same program as one process."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_taipan.evaluation import perplexity, perplexity_by_length
from megatron_taipan.evaluation.__main__ import TASKS
from megatron_taipan.evaluation.__main__ import main as task
from megatron_taipan.evaluation.ranks import device_of_rank
from megatron_taipan.inference import generate
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel import processes
from tests.checkpoint.test_weights import write_weights
from tests.distributed.launch import launch
from tests.evaluation.test_perplexity_by_length import write_data
from tests.inference.networks import small_config

PATTERNS = {"all": "M S W A M S", "window": "W W", "mamba": "M"}
CASES = {  # windows of 6 tokens are longer than the pieces of 8 and shorter than those of 32 and more
    "one document": ["--lengths", "8,32,256", "--tokens", "300", "--documents", "one", "--chunk", "20"],
    "in a row": ["--lengths", "8,64,256", "--tokens", "300", "--documents", "row", "--chunk", "50"],
    "packed": ["--seq-len", "32", "--samples", "9", "--untrained"],
}
SAYS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def run(arguments: list[str]) -> tuple[int, str, str]:
    """Status, what was printed, and what was said on stderr."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = perplexity.main(arguments)
    return status, out.getvalue(), err.getvalue()


def run_all(cases: list[list[str]]) -> list[tuple[int, str, str]]:
    processes.time.sleep = lambda seconds: None  # of a rank with an error, for the first to speak
    return [run(arguments) for arguments in cases]


def run_short_of_memory(arguments: list[str], length: int) -> tuple[int, str, str]:
    """As `run`; every rank lacks memory at that length."""
    whole = perplexity_by_length.losses_of_piece

    def too_much(model, rows, parts):
        if rows["tokens"].shape[1] * dist.get_world_size() == length:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, rows, parts)

    perplexity_by_length.losses_of_piece = too_much
    processes.time.sleep = lambda seconds: None
    return run(arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Networks by name, one whose gates are practically off, and a dataset."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, pattern in PATTERNS.items():
        write_weights(folder / name, Taipan(small_config(pattern), seed=3))
    off = Taipan(small_config("M S"), seed=3)
    off.layers[1].gate.threshold.fill_(1e9)
    write_weights(folder / "off", off)
    write_data(folder / "data", [260, 520, *[7, 30, 3, 41] * 20])
    return folder


def arguments_of(made: Path, case: str, out: str) -> list[str]:
    models = [str(made / name) for name in PATTERNS]
    return [*models, "--data", str(made / "data"), *CASES[case], "--out", str(made / out / case)]


@pytest.fixture(scope="module")
def of_two(made) -> list[list[tuple[int, str, str]]]:
    """What each of two ranks gave, by rank and case; the last case is that of the gates."""
    gates = [str(made / "off"), "--data", str(made / "data"), "--seq-len", "32", "--samples", "9"]
    return launch(2, run_all, [*(arguments_of(made, case, "two") for case in CASES), gates], join=False)


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_find_and_write_what_one_process_does(made, of_two, case):
    status, printed, _ = run(arguments_of(made, case, "one"))
    first, second = (rank[list(CASES).index(case)] for rank in of_two)
    assert (status, first[0], second[0]) == (0, 0, 0)
    assert first[1] == printed and second[1] == ""
    one, two = made / "one" / case, made / "two" / case
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for name in (path.name for path in one.iterdir() if path.suffix == ".json"):
        wanted, found = read(one, name), read(two, name)
        assert len(wanted["rows"]) >= len(PATTERNS)
        for ours, theirs in zip(found.pop("rows"), wanted.pop("rows"), strict=True):
            assert ours == {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in theirs.items()}
        assert found == wanted
        assert (one / name).with_suffix(".md").read_text() == (two / name).with_suffix(".md").read_text()


def test_gates_that_are_off_are_told_of_once_by_what_all_pieces_selected(of_two):
    """Each rank has seen 144 tokens, too few to tell of; together they are 288."""
    (_, _, first), (_, _, second) = (rank[-1] for rank in of_two)
    assert first.count("warning: ") == 1 and "layers.1 selects 0.00% of the tokens" in first
    assert second == ""


def test_a_lack_of_memory_keeps_what_was_scored_before(made):
    out = made / "short"
    arguments = [str(made / "all"), "--data", str(made / "data"), "--lengths", "8,32,128", "--out", str(out)]
    (status, _, said), (other, _, also) = launch(2, run_short_of_memory, arguments, 128, join=False)
    assert status == other == 2
    assert "error: rank 0 lacks memory for 4 x 64 tokens, its pieces of contexts of 128" in said
    assert "error on rank 1: rank 1 lacks memory" in also
    assert [row["length"] for row in read(out, "perplexity.json")["rows"]] == [8, 32]
    assert read(out, "perplexity_by_position.json")["rows"][-1]["below position"] == 32


@pytest.mark.parametrize(
    ("count", "given", "words"),
    [
        ("3", ["--lengths", "9,32"], "--lengths=32 is not a multiple of processes=3 (remainder 2); take 30"),
        ("2", ["--lengths", "4,32"], "a piece of --lengths=4 / processes=2 = 2 tokens is shorter than the 3 inputs"),
        ("5", ["--seq-len", "32"], "--seq-len=32 is not a multiple of processes=5"),
        ("8", ["--seq-len", "4"], "--seq-len=4 is not a multiple of processes=8 (remainder 4); take 8"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anything_is_loaded(made, monkeypatch, capsys, count, given, words):
    for name, value in (SAYS | {"WORLD_SIZE": count}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(perplexity, "build_with_weights", None)
    monkeypatch.setattr(perplexity, "joined_ranks", None)
    assert perplexity.main([str(made / "window"), str(made / "all"), "--data", str(made / "data"), *given]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in TASKS if name != "perplexity"])
def test_other_tasks_say_that_they_run_as_one_process(name, monkeypatch, capsys):
    for variable, value in SAYS.items():
        monkeypatch.setenv(variable, value)
    assert task([name, "--help"]) == 2
    said = capsys.readouterr()
    assert "runs as one process, and 2 were started" in said.err and not said.out


def test_so_does_generation(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for variable, value in (("PROCID", "0"), ("LOCALID", "0"), ("STEP_NODELIST", "here")):
        monkeypatch.setenv(f"SLURM_{variable}", value)
    assert generate.main(["--help"]) == 2
    assert "runs as one process, and 2 were started" in capsys.readouterr().err


def test_one_device_is_not_shared_by_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = processes.find_place(SAYS | {"RANK": "1", "LOCAL_RANK": "1"})
    assert [device_of_rank(place, name) for name in ("auto", "cuda", "cpu")] == [
        torch.device("cuda", 1), torch.device("cuda", 1), torch.device("cpu"),
    ]  # fmt: skip
    with pytest.raises(processes.UserError, match="--device cuda:0 is one device for 2 processes"):
        device_of_rank(place, "cuda:0")
