"""An exported folder runs under lm_eval's hf model, offline, on a local task, and is scored as we score it.

A text begins with BOS where the documents of the training data did, and only there. Where there is nothing before the
text that is scored, lm_eval itself puts BOS there or, where none is declared, EOS.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints.export_hf import export
from megatron_taipan.inference.loading import load_model
from megatron_taipan.tokenizer.load import load_tokenizer_file
from tests.checkpoints.made import ROOT, memory_state, train_sentencepiece, write_checkpoint
from tests.checkpoints.test_text_of_exports import data_of, tokenize
from tests.evaluation.zero_shot_data import RECORDS, write_tasks
from tests.hf.test_libraries import install

# What `lm_eval --model hf` needs beyond the usual environment.
NEEDS = (
    "lm_eval accelerate evaluate sacrebleu rouge_score word2number pytablewriter more-itertools jsonlines nltk joblib"
    " scikit-learn scipy threadpoolctl portalocker tabulate colorama chardet DataProperty mbstrdecoder pathvalidate"
    " tabledata tcolorpy typepy tqdm-multiprocess sqlitedict six"
).split()

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> str:
    """A folder with lm_eval in it, as constraints.txt has it."""
    return str(install(tmp_path_factory.mktemp("lm_eval"), NEEDS))


def environment(site: str, home: Path) -> dict[str, str]:
    """Variables with which lm_eval is found and asks nothing of the network."""
    paths = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home / "home")}
    return os.environ | {"PYTHONPATH": paths} | offline


def log_likelihood(model, codec, begin: list[int], context: str, choice: str) -> float:
    """log P(choice | context) by one forward pass per choice, no batch, no padding. `begin`: ids before the context."""
    before, ids = begin + codec.encode(context), begin + codec.encode(context + choice)
    with torch.no_grad():
        logs = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(len(before), len(ids)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--append-eod"], marks=pytest.mark.manual),  # run 2026-11-29: passed in 24 s
        ["--prepend-bos", "--append-eod"],
    ],
)
def test_multiple_choice_is_scored_as_we_score_it(tmp_path, options, site):
    tokenizer = train_sentencepiece(tmp_path)
    state = memory_state("M S W", vocab_size=600)
    data = data_of(tokenize(tmp_path, "data", tokenizer, *options))
    state.config = state.config.model_copy(update={"data": data})
    export(state, tmp_path / "hf", tokenizer=tokenizer)
    begin = [1] if "--prepend-bos" in options else []
    rows = [
        {"context": "import os\nimport", "choices": [" sys", " numpy as np", " x"], "label": 0},
        {"context": "def __init__(self", "choices": ["):", ", a, b, c):", " while"], "label": 1},
        {"context": "return", "choices": [" None", " self.value + 1", " 0"], "label": 2},
        {"context": "", "choices": ["import", "def", "x"], "label": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/task.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "local_choice"]
    command += ["--model_args", f"pretrained={tmp_path / 'hf'},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(tmp_path / "tasks"), "--batch_size", "4", "--log_samples"]
    command += ["--output_path", str(tmp_path / "result")]
    subprocess.run(
        command,
        env=environment(site, tmp_path),
        cwd=tmp_path,
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )

    model, codec = load_model(tmp_path / "hf")[0], load_tokenizer_file(tokenizer)
    samples = [
        json.loads(line) for line in next((tmp_path / "result").rglob("samples_*.jsonl")).read_text().splitlines()
    ]
    assert len(samples) == len(rows)
    for sample in samples:
        row = rows[sample["doc_id"]]
        got = [float(answer[0][0]) for answer in sample["resps"]]
        first = begin if row["context"] else begin or [2]
        wanted = [log_likelihood(model, codec, first, row["context"], choice) for choice in row["choices"]]
        assert got == pytest.approx(wanted, abs=1e-3)


@pytest.mark.manual
def test_the_nine_tasks_of_a_checkpoint(tmp_path, site):
    """Run 2026-11-29 with lm_eval 0.4.13, transformers 5.23.0 and datasets 5.2.0: passed in 132 s on busy cores."""
    tokenizer, state = train_sentencepiece(tmp_path), memory_state("M S W", vocab_size=600)
    data = state.config.data.model_copy(update={"tokenizer": str(tokenizer)})
    config = state.config.model_copy(update={"data": data})
    checkpoint = write_checkpoint(tmp_path / "run", config, state.load)
    write_tasks(tmp_path / "data")
    command = [sys.executable, "-m", "megatron_taipan.evaluation", "zero-shot", str(checkpoint), "--device", "cpu"]
    command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    env = environment(f"{site}{os.pathsep}{ROOT}", tmp_path)
    subprocess.run(command, env=env, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL)
    record = json.loads((tmp_path / "out/zero-shot.json").read_text())
    rows = {row["task"]: row for row in record["rows"]}
    assert record["about"]["lm_eval"] == "0.4.13"
    versions = {task: rows[task]["version"] for task in RECORDS}
    assert versions == {**dict.fromkeys(RECORDS, 1.0), "truthfulqa_mc2": 3.0, "race": 3.0, "boolq": 2.0}

    model, codec = load_model(checkpoint)[0], load_tokenizer_file(tokenizer)
    asked = [  # task, what comes before, the choices, the right one
        *(("arc_easy", f"Question: {r['question']}\nAnswer:", r["choices"]["text"], 1) for r in RECORDS["arc_easy"]),
        *(("piqa", f"Question: {r['goal']}\nAnswer:", [r["sol1"], r["sol2"]], r["label"]) for r in RECORDS["piqa"]),
        *(
            ("boolq", f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:", ["no", "yes"], r["label"])
            for r in RECORDS["boolq"]
        ),
        ("hellaswag", "Baking: She mixes flour. She", RECORDS["hellaswag"][0]["endings"], 0),
    ]
    for task in {one[0] for one in asked}:
        plain, by_length = [], []
        for before, choices, right in (one[1:] for one in asked if one[0] == task):
            told = [log_likelihood(model, codec, [], before, f" {choice}") for choice in choices]
            per = [t / len(choice) for t, choice in zip(told, choices, strict=True)]
            plain.append(told.index(max(told)) == right)
            by_length.append(per.index(max(per)) == right)
        assert rows[task]["acc"] == pytest.approx(sum(plain) / len(plain)), task
        if task != "boolq":
            assert rows[task]["acc_norm"] == pytest.approx(sum(by_length) / len(by_length)), task
    scores = [rows[task]["score"] for task in RECORDS]
    assert rows["mean of 9"]["score"] == pytest.approx(sum(scores) / 9)
