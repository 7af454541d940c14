"""Zero-shot tasks: data from the disk alone, what lm-eval is given, and its results as a table.

lm-eval itself is not needed here; tests/hf/test_lm_eval.py runs it on the same records.
"""

import json
import subprocess

import datasets
import pytest
import tokenizers

from megatron_taipan.data_config import DataConfig, DataSource
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation import zero_shot
from megatron_taipan.evaluation.zero_shot import load_task, main
from megatron_taipan.evaluation.zero_shot_tasks import TASKS
from megatron_taipan.model.taipan import Taipan
from tests.checkpoint.test_weights import write_weights
from tests.checkpoints.made import memory_state, train_sentencepiece, write_checkpoint
from tests.evaluation.zero_shot_data import RECORDS, write_tasks
from tests.inference.networks import small_config

FOUND = {  # as lm-eval 0.4.13 returns it
    "results": {
        "hellaswag": {"alias": "hellaswag", "acc,none": 0.25, "acc_norm,none": 0.5},
        "winogrande": {"alias": "winogrande", "acc,none": 1.0},
    },
    "versions": {"hellaswag": 1.0, "winogrande": 1.0},
    "n-samples": {"hellaswag": {"original": 9, "effective": 4}, "winogrande": {"original": 2, "effective": 2}},
    "lm_eval": "0.4.13",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture
def export(tmp_path):
    folder = write_weights(tmp_path / "hf", Taipan(small_config("M S", vocab_size=600)))
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_the_records_of_every_task_are_read_in_either_form(data, task):
    splits = load_task(data, task)
    assert list(splits) == [TASKS[task].split]
    assert [dict(record) for record in splits[TASKS[task].split]] == RECORDS[task]


def test_data_that_a_task_cannot_use_is_refused(tmp_path, data):
    with pytest.raises(UserError, match="has no folder race; save EleutherAI/race .high. there"):
        load_task(tmp_path, "race")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(RECORDS["piqa"])}).save_to_disk(str(tmp_path / "piqa"))
    with pytest.raises(UserError, match="has the splits test, and piqa is scored on validation"):
        load_task(tmp_path, "piqa")
    datasets.Dataset.from_list([{"question": "q", "label": 1}]).save_to_disk(str(tmp_path / "boolq"))
    with pytest.raises(UserError, match="its records have no passage, as those of aps/super_glue"):
        load_task(tmp_path, "boolq")
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag/validation.parquet").write_text("x")
    with pytest.raises(UserError, match="datasets cannot read"):
        load_task(tmp_path, "hellaswag")


def test_without_lm_eval_the_command_that_installs_it_is_named(data, export, monkeypatch, capsys):
    monkeypatch.setattr(zero_shot.importlib.util, "find_spec", lambda name: None)
    assert main([str(export), "--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert "needs lm_eval and accelerate: pip install --constraint constraints.txt '.[eval]'" in error


def test_results_are_lm_evals_and_their_mean(data, export, tmp_path, monkeypatch, capsys):
    calls = []

    def harness(folder, splits, options, max_length):
        calls.append((folder, list(splits), options.limit, max_length))
        return FOUND

    monkeypatch.setattr(zero_shot, "require_lm_eval", lambda: None)
    monkeypatch.setattr(zero_shot, "run_harness", harness)
    arguments = [
        "--data",
        str(data),
        "--tasks",
        "winogrande, hellaswag",
        "--limit",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([str(export), *arguments]) == 0
    assert calls == [(export, ["winogrande", "hellaswag"], 4, 2048)]
    record = json.loads((tmp_path / "out/zero-shot.json").read_text())
    assert record["about"]["lm_eval"] == "0.4.13"
    wino, hella, mean = record["rows"]
    assert (wino["task"], wino["version"], wino["score"], wino["questions"]) == ("winogrande", 1.0, 1.0, 2)
    assert (hella["metric"], hella["score"], hella["acc"], hella["questions"]) == ("acc_norm", 0.5, 0.25, 4)
    assert (mean["task"], mean["score"]) == ("mean of 2", 0.75)
    assert all(f">{row['task']}<" in (tmp_path / "out/zero-shot.svg").read_text() for row in record["rows"])
    assert "| mean of 2 |" in capsys.readouterr().out
    assert main([str(export), "--data", str(data), "--tasks", "winogrand"]) == 2
    assert "'winogrand' is none of winogrande, piqa" in capsys.readouterr().err
    assert main([str(export), *arguments, "--tokenizer", str(export / "tokenizer.json")]) == 2
    assert "leave out --tokenizer" in capsys.readouterr().err


def test_a_checkpoint_is_exported_to_a_folder_that_goes_away(data, tmp_path, monkeypatch, capsys):
    state = memory_state("M S", vocab_size=600)
    tokenizer = train_sentencepiece(tmp_path)
    update = {"data": DataConfig(train=[DataSource(prefix="none")], seq_len=4096, tokenizer=str(tokenizer))}
    config = state.config.model_copy(update=update)
    checkpoint = write_checkpoint(tmp_path / "run/step_00000007", config, state.load)
    seen = []

    def run(command, **_):
        seen.append(command)
        return subprocess.CompletedProcess(command, len(seen) - 1, stderr="note: x\nerror: the disk is full\n")

    def harness(folder, splits, options, max_length):
        assert folder.parent.is_dir() and max_length == 4096
        seen.append(folder)
        return FOUND

    monkeypatch.setattr(zero_shot, "require_lm_eval", lambda: None)
    monkeypatch.setattr(zero_shot, "run_harness", harness)
    monkeypatch.setattr(zero_shot.subprocess, "run", run)
    arguments = [str(checkpoint), "--data", str(data), "--dtype", "bf16", "--tasks", "winogrande,hellaswag"]
    assert main(arguments) == 0
    command, folder = seen
    assert command[2:] == ["checkpoints.export_hf", str(checkpoint), str(folder), "--dtype", "bf16"]
    assert not folder.parent.exists() and "note: x" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "cannot be exported for lm-eval: the disk is full" in capsys.readouterr().err
