"""An exported folder runs under lm_eval's hf model, offline, on a local task, and is scored as we score it.

A text begins with BOS where the documents of the training data did, and only there. Where there is nothing before the
text that is scored, lm_eval itself puts BOS there or, where none is declared, EOS.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from checkpoints.export_hf import export
from megatron_taipan.inference.loading import load_model
from megatron_taipan.tokenizer.load import load_tokenizer_file
from tests.checkpoints.made import memory_state, train_sentencepiece
from tests.checkpoints.test_text_of_exports import data_of, tokenize
from tests.hf.test_libraries import install

# What `lm_eval --model hf` needs beyond the usual environment.
NEEDS = (
    "lm_eval accelerate evaluate sacrebleu rouge_score word2number pytablewriter more-itertools jsonlines nltk joblib"
    " scikit-learn scipy threadpoolctl portalocker tabulate colorama chardet DataProperty mbstrdecoder pathvalidate"
    " tabledata tcolorpy typepy tqdm-multiprocess sqlitedict"
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


def log_likelihood(model, codec, begin: list[int], context: str, choice: str) -> float:
    """log P(choice | context) by one forward pass per choice, no batch, no padding. `begin`: ids before the context."""
    before, ids = begin + codec.encode(context), begin + codec.encode(context + choice)
    with torch.no_grad():
        logs = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(len(before), len(ids)))


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--append-eod"], ["--prepend-bos", "--append-eod"]])
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
    paths = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
    env = os.environ | {
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, stdin=subprocess.DEVNULL)

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
