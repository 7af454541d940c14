"""The program that runs the gpu tests of this machine, without a GPU: which files, where, and what counts as passed."""

import json
from pathlib import Path

import pytest

from tests import on_gpus
from tests.on_gpus import ROOT, SEVERAL, gpu_files, gpu_groups, lanes, run_file


def test_every_file_that_looks_at_the_number_of_gpus_is_known():
    files = gpu_files([ROOT / "tests"])
    assert len(files) > 25 and set(SEVERAL) <= set(files)
    counting = {file for file in files if "device_count() <" in (ROOT / file).read_text("utf-8")}
    assert counting == set(SEVERAL)


def test_files_share_the_gpus_without_a_gpu_in_two_groups():
    assert gpu_groups(["0", "1", "2", "3"], 2, 1) == ["0,1", "2,3"]
    assert gpu_groups(["0", "1", "2"], 2, 2) == ["0,1", "0,1"]
    assert gpu_groups(["5"], 4, 1) == ["5"]


def test_files_of_several_gpus_run_beside_those_of_one_or_before_them():
    four, two = "tests/parallel/test_overlapped_comm.py", "tests/hf/test_devices.py"
    files = ["tests/ops/test_rope.py", two, four]
    assert lanes(files, 1) == [([4, 2, 1], 1)]
    assert lanes(files, 3) == [([4, 2], 1), ([1], 2)]
    assert lanes(files[:1], 3) == [([1], 3)] and lanes(files[1:], 3) == [([4, 2], 3)]


@pytest.mark.parametrize(
    ("body", "timeout", "said"),
    [
        ("assert True", 60, None),
        ("assert False", 60, "status 1, 1 failed.*FAILED .*::test_it"),
        ("import time; time.sleep(60)", 4, "not done within 4 s"),
    ],
)
def test_a_file_passes_fails_or_takes_too_long(tmp_path, body, timeout, said):
    file = tmp_path / "test_body.py"
    file.write_text(
        "import os, pytest\n@pytest.mark.g"
        "pu\n"  # in two, so that this file is none of them
        f"def test_it():\n    assert os.environ['CUDA_VISIBLE_DEVICES'] == '2,3'\n    {body}\n"
        "def test_without_a_gpu(): assert False\n"
    )
    run = {"what": {"file": str(file)}, "gpus": "2,3", "out": tmp_path, "timeout": timeout}
    if said is None:
        assert run_file(**run)["passed"] == 1
    else:
        with pytest.raises(RuntimeError, match=said):
            run_file(**run)


def test_what_passed_is_not_run_again_and_a_failure_shows(tmp_path, monkeypatch, capsys):
    tried: list[tuple[str, str]] = []

    def run(what: dict, gpus: str, out: Path, timeout: float) -> dict:
        tried.append((what["file"], gpus))
        if what["file"].endswith("test_rope.py"):
            raise RuntimeError("status 1")
        return {"passed": 3, "skipped": 1, "seconds": 2}

    monkeypatch.setattr(on_gpus, "run_file", run)
    monkeypatch.setattr(on_gpus, "gpu_names", lambda: ["0", "1"])
    places = ["tests/ops/test_rope.py", "tests/distributed/test_layouts_gpu.py", "tests/ops/test_gate_scores.py"]
    command = [*(str(ROOT / place) for place in places), "--out", str(tmp_path)]
    assert on_gpus.main(command) == 1
    assert (places[1], "0,1") in tried and {file for file, _ in tried} == set(places)
    assert "6 passed, 2 skipped in 2 files; 1 failed or are left" in capsys.readouterr().out
    assert on_gpus.main(command) == 1 and [file for file, _ in tried[3:]] == [places[0]]
    lines = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    assert [("result" in line, line["run"]["file"]) for line in lines].count((False, places[0])) == 2
