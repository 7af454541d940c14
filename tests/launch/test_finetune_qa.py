"""Fine-tuning on answers alone, from rows of text to the trained checkpoint, with the shipped configuration."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

from data_prep import cli
from megatron_taipan.checkpoint.loading import load_weights
from megatron_taipan.config import Config
from megatron_taipan.config_loading import load_config
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.model.taipan import Taipan
from tests.distributed.launch import ROOT
from tests.launch.test_pretrain import run

EOD = 2
WORDS = "door tower river bridge winter garden letter market island window captain engine forest number castle".split()
TINY = [
    "model.vocab_size=420", "model.pattern=M S", "model.d_model=32", "model.d_ff=48", "model.attention.window=24",
    "model.mamba={d_state: 16, headdim: 16, chunk_size: 16}", "model.attention.n_heads=2", "data.seq_len=256",
    "data.workers=0", "data.valid_fraction=0.1", "train.steps=2", "train.global_batch=4", "train.precision=fp32",
    "train.eval_every=0", "train.eval_samples=4", "checkpoint.save_every=0", "log.every=1", "log.tensorboard=false",
]  # fmt: skip


def made_up(kind: str) -> tuple[list[dict], list[tuple[str, str]]]:
    """Rows of the corpus's schema, and the prompt and the answer of each, written by hand."""
    draw, rows, pairs = random.Random(3), [], []
    for number in range(60):
        facts = [(a, b) for a, b in zip(draw.sample(WORDS, 4), draw.sample(WORDS, 4), strict=True)]
        context = " ".join(f"The {a} is behind the {b}." for a, b in facts)
        a, b = draw.choice(facts)
        answer = f"the {b}" if number % 3 else f"the {b}, said the {draw.choice(WORDS)}"
        if kind == "squad":
            question = f"What is the {a} behind?"
            answers = {"text": [answer, "something else"], "answer_start": [0, 0]}
            row = {"id": str(number), "title": "t", "context": context, "question": question, "answers": answers}
            prompt = f"{context}\n\nQuestion: {question}\nAnswer:"
        else:
            prompt = f"{context} Behind the {a}:"
            row = {"doc_id": "1", "file_name": "1.htm", "key": a, "value": answer, "text": prompt}
        rows.append(row)
        pairs.append((prompt, answer))
    return rows, pairs


def program(*arguments: str) -> None:
    finished = run(sys.executable, "launch/pretrain.py", "--config", "launch/configs/finetune_qa.yaml", *arguments)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module", params=["squad", "swde"])
def trained(request, tmp_path_factory) -> tuple[Path, Config, list[tuple[str, str]]]:
    """The two commands of the configuration, after a few steps of pretraining on the whole texts."""
    folder = tmp_path_factory.mktemp(request.param)
    rows, pairs = made_up(request.param)
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = ["--recipe", "squad"]
    if request.param == "swde":  # pages of one's own in that form
        form = ["--template", "{text}{% generation %} {value}{% endgeneration %}"]
    text = ["--input", f"{folder}/in.jsonl", *form]
    tokenizer = f"{folder}/t.model"
    assert cli.main(["train-tokenizer", *text, "--output", tokenizer, "--vocab-size", "420"]) == 0
    given = [*text, "--allow-evaluation-data", "--tokenizer", tokenizer, "--append-eod", "--output", f"{folder}/qa"]
    assert cli.main(["tokenize", *given]) == 0
    before = [f"data.train=[{{prefix: {folder}/qa, loss_mask: ignore}}]", f"checkpoint.dir={folder}/base"]
    program(*TINY, *before, "checkpoint.init=null")
    after = [f"data.train=[{{prefix: {folder}/qa, loss_mask: require}}]", f"checkpoint.dir={folder}/tuned"]
    arguments = [*TINY, *after, f"checkpoint.init={folder}/base"]
    program(*arguments)
    return folder, load_config(ROOT / "launch/configs/finetune_qa.yaml", arguments), pairs


def labels_by_hand(tokens: list[int], library, pairs) -> list[tuple[int, int]]:
    """(position, label) of all that is learned in a sample of L + 1 tokens: answers and ends of documents that begin in
    it."""
    whole = {tuple(library.encode(f"{p} {a}")): len(library.encode(p)) for p, a in pairs}
    ends = [at for at, token in enumerate(tokens) if token == EOD]
    found = []
    for begin, end in zip([-1, *ends], [*ends, len(tokens)], strict=True):
        inside = tuple(tokens[begin + 1 : end])
        prompts = {n for document, n in whole.items() if document[: len(inside)] == inside}
        if begin < 0 and inside not in whole:  # the rest of a document
            continue
        # cut at the sample's end it may be the beginning of several
        first = min(prompts) if inside not in whole else whole[inside]
        assert inside in whole or end == len(tokens)
        found += [(at - 1, tokens[at]) for at in range(begin + 1 + first, min(end + 1, len(tokens)))]
    return found


@torch.no_grad()
def test_the_loss_is_that_of_the_answers_alone(trained):
    """The first step's, recomputed from the logits of the weights that it began with."""
    folder, config, pairs = trained
    library = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/t.model")
    model = Taipan(config.model)
    load_weights(model, folder / "base")
    model.train()
    data = build_dataset(config.data, "train", config.model.vocab_size)
    batch = data.batch(list(range(4)))
    logits = model(batch["tokens"], seq_idx=batch["seq_idx"], samples=batch["sample"], step=0).logits.double()
    total, count = 0.0, 0
    for row in range(4):
        ids, _ = data.tokens(row)
        for at, label in labels_by_hand(ids.tolist(), library, pairs):
            scores = logits[row, at].tolist()
            top = max(scores)
            total += top + math.log(sum(math.exp(score - top) for score in scores)) - scores[label]
            count += 1
    assert 20 < count < 4 * 256 / 4
    first, _ = (json.loads(line) for line in (folder / "tuned/log.jsonl").open() if '"step_s"' in line)
    assert first["ce"] == pytest.approx(total / count, rel=1e-5)
    assert first["step"] == 1


def test_a_lost_mask_stops_the_run(trained):
    folder, config, _ = trained
    mask = folder / "qa_loss_mask.idx"
    mask.rename(folder / "away")
    try:
        finished = run(
            sys.executable, "launch/pretrain.py", "--config", "launch/configs/finetune_qa.yaml", *TINY,
            f"data.train=[{{prefix: {folder}/qa, loss_mask: require}}]", f"checkpoint.dir={folder}/new",
            f"checkpoint.init={folder}/base",
        )  # fmt: skip
    finally:
        (folder / "away").rename(mask)
    assert finished.returncode == 2 and "qa_loss_mask.idx does not exist" in finished.stderr
