"""Whole runs on two processes: stop, resume, refuse."""

import json
import shutil
from pathlib import Path

import pytest
import xxhash

from megatron_taipan.checkpoint.folder import CONFIG, checkpoints, find_newest
from megatron_taipan.checkpoint.metadata import read_metadata
from megatron_taipan.config_loading import load_config
from megatron_taipan.train.metadata import git_commit
from tests.distributed.launch import launch
from tests.train.runs import log, runs, with_options
from tests.train.toy import toy_tree, write_data

SHORT = {"steps": 2, "global_batch": 4, "micro_batch": 2, "precision": "fp32", "eval_every": 0, "eval_samples": 2}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def test_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path, prefix):
    tree = toy_tree(prefix, tmp_path / "run", train=SHORT)
    other = write_data(tmp_path / "other", seed=1)
    cases = [
        (with_options(tree, model={"d_ff": 64}), ["model.d_ff", "48", "64"]),
        (with_options(tree, model={"pattern": "M S M W"}), ["model.pattern", "M S M A", "M S M W"]),
        (with_options(tree, data={"train": other}), ["data.fingerprint"]),
        (with_options(tree, data={"seq_len": 16}), ["data.seq_len", "32", "16"]),
        (with_options(tree, train={"seed": 7}), ["train.seed", "1234", "7"]),
        (with_options(tree, checkpoint={"load": None}), ["step_00000002", "checkpoint.dir"]),
        (with_options(tree, checkpoint={"load": str(tmp_path / "nowhere"), "dir": str(tmp_path / "new")}), ["nowhere"]),
    ]
    assert launch(2, runs, [tree])[0] == [0]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "lock"]
    before = {path: path.read_bytes() for path in files}
    for results in launch(2, runs, [case for case, _ in cases]):
        for message, (_, words) in zip(results, cases, strict=True):
            assert isinstance(message, str), words
            assert all(word in message for word in words), (words, message)
            assert "\n" not in message
    assert {path: path.read_bytes() for path in before} == before


def test_data_is_verified_by_all_ranks_before_the_first_step(tmp_path):
    """The shards of one output, one of which lacks its checksums, then one of which changed, then all well."""
    paths = [write_data(tmp_path / f"o-0000{k}", seed=k) for k in range(3)]
    sums = {f"{path}.{e}": xxhash.xxh3_128(Path(f"{path}.{e}").read_bytes()).hexdigest() for path in paths
            for e in ("bin", "idx")}  # fmt: skip
    shards = [
        {"prefix": Path(path).name, **{f"{e}_xxh3_128": sums[f"{path}.{e}"] for e in ("bin", "idx")}} for path in paths
    ]
    tree = toy_tree(str(tmp_path / "o"), tmp_path / "run", train=SHORT, data={"verify": True})

    def start(changed: dict) -> list:
        (tmp_path / "o.json").write_text(json.dumps({"shards": [*shards[:2], shards[2] | changed]}))
        return [results[0] for results in launch(2, runs, [tree])]

    for message in start({"idx_xxh3_128": "0" * 32}):
        assert "o-00002.idx has checksum" in message and "bytes of it changed" in message
    assert not (tmp_path / "run/log.jsonl").exists()
    assert start({}) == [0, 0]
    checked, blend = (record["text"] for record in log(tmp_path / "run", "data"))
    assert checked.startswith("every byte of 6 files, ") and "(data.verify)" in checked
    assert blend.startswith(f"{tmp_path / 'o'} (3 shards), ") and "epochs" in blend


def test_damaged_checkpoints_are_passed_over(tmp_path, prefix):
    """A changed file, which only its hash shows, and a cut one: the run goes on from an older one and says why."""
    tree = toy_tree(prefix, tmp_path / "run", train=SHORT, checkpoint={"save_every": 1})
    longer = with_options(tree, train={"steps": 3})
    assert launch(2, runs, [tree])[0] == [0]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000001", "step_00000002"]
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for name in ("run", "cut"):
        newest = tmp_path / name / "step_00000002"
        state_file = max((newest / "state").iterdir(), key=lambda p: p.stat().st_size)
        content = state_file.read_bytes()
        end = bytes([content[-1] ^ 1]) if name == "run" else b""
        state_file.write_bytes(content[:-1] + end)
    new, by_name = (with_options(longer, checkpoint={"dir": str(tmp_path / name)}) for name in ("new", "other"))
    new["checkpoint"]["load"] = str(tmp_path / "run")
    by_name["checkpoint"]["load"] = str(tmp_path / "run" / "step_00000002")
    cut = with_options(longer, checkpoint={"dir": str(tmp_path / "cut")})
    results = launch(2, runs, [new, by_name, longer, cut])[1]
    assert results[0] == results[2] == results[3] == 0
    assert "step_00000002" in results[1] and f"{state_file.name} changed" in results[1]
    for name, reason in (("run", "changed since it was written"), ("cut", "bytes, its manifest says")):
        (warning,) = [r for r in log(tmp_path / name, "warning") if "passed over" in r["text"]]
        assert warning["text"].startswith("passed over checkpoint step_00000002: ") and reason in warning["text"]
        assert [record["step"] for record in log(tmp_path / name)] == [1, 2, 2, 3]
        assert find_newest(tmp_path / name).path.name == "step_00000003"
    assert [record["step"] for record in log(tmp_path / "new")] == [2, 3]


def test_what_stands_beside_a_checkpoint_and_which_are_kept(tmp_path, prefix):
    tree = toy_tree(prefix, tmp_path / "run", train=SHORT | {"steps": 5})
    tree["checkpoint"] |= {"save_every": 1, "keep_last": 2, "keep_every": 2}
    second = with_options(
        tree, train={"steps": 6}, checkpoint={"dir": str(tmp_path / "second"), "load": str(tmp_path / "run")}
    )
    third = with_options(second, train={"steps": 7})
    assert launch(2, runs, [tree, second, third])[0] == [0, 0, 0]
    assert [path.name[-1] for path in checkpoints(tmp_path / "run")] == ["2", "4", "5"]
    path = tmp_path / "run" / "step_00000005"
    metadata = read_metadata(path)
    counters = {"step": 5, "samples": 20, "tokens": 20 * 32, "skipped": 0}
    (share,) = metadata["progress"].pop("shares")  # of the one gate, in the last step
    assert share == log(tmp_path / "run")[-1]["layers.1.selected"]
    assert metadata["progress"] == counters | {"recent": [], "rewinds": [], "run_steps": 5}
    assert {"torch", "deepspeed", "python"} <= set(metadata["versions"])
    assert metadata["git_commit"] == git_commit()  # None where there is no git
    assert len(metadata["identity"]["data.fingerprint"]) >= 16
    assert load_config(path / CONFIG).train.global_batch == 4
    assert (tmp_path / "run" / "latest").read_text() == "step_00000005\n"
    # checkpoint.load=FOLDER starts there while checkpoint.dir is empty, and resumes from checkpoint.dir later
    assert [record["step"] for record in log(tmp_path / "second")] == [6, 7]
    assert [record["step"] for record in log(tmp_path / "second", "start")] == [5, 6]
    shutil.rmtree(tmp_path)


def test_validation_changes_nothing_under_zero_3_with_recomputed_layers(tmp_path, prefix):
    """A pass without gradients teaches ZeRO-3 an order of modules that the recomputation then does not keep to."""
    validated = toy_tree(prefix, tmp_path / "one", train=SHORT | {"steps": 4, "eval_every": 2})
    recomputed = {"zero_stage": 3, "recompute": "selective", "timeout_s": 60}
    stage3 = with_options(validated, parallel=recomputed, checkpoint={"dir": str(tmp_path / "three")})
    assert launch(2, runs, [validated, stage3])[0] == [0, 0]
    one, three = ([r["ce"] for r in log(tmp_path / n)] for n in ("one", "three"))
    assert three == pytest.approx(one, rel=1e-5)
    one, three = ([r["ce"] for r in log(tmp_path / n, "valid")] for n in ("one", "three"))
    assert three == pytest.approx(one, rel=1e-5) and len(one) == 3
