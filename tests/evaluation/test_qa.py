"""Questions and answers: fields as the data sets have them, prompts as the literature has them, results as scored."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation import found_again
from megatron_taipan.evaluation.qa import main
from megatron_taipan.evaluation.qa_formats import read_questions
from megatron_taipan.evaluation.qa_prompts import choose_shots, make_prompt
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.tokenizer.load import load_tokenizer_file
from tests.checkpoint.test_weights import write_weights
from tests.checkpoints.made import train_sentencepiece
from tests.inference.networks import small_config

SAMPLE = Path(__file__).parents[2] / "data_prep/sample/state_of_the_union_qa.json"
WALL = (
    "The Great Wall of China is a series of fortifications that were built across the historical northern borders of"
    " ancient Chinese states as protection against various nomadic groups. The best-known sections were built by the"
    " Ming dynasty."
)
ANSWER = "protection against various nomadic groups"
FLAT = {
    "id": "wall", "title": "Great Wall", "context": WALL, "question": "What was it built for?",
    "answers": {"text": [ANSWER, "protection"], "answer_start": [WALL.index(ANSWER), WALL.index("protection")]},
}  # fmt: skip
FDA = {
    "doc_id": "K1.txt", "file_name": "K1.txt", "key": "purpose for submission", "value": " New device ",
    "text": "A. Number:\nK1\nB. Purpose for Submission:\nNew device\nC. Measurand:\nGlucose\nPurpose for submission:",
}  # fmt: skip
CLOZE = {
    "doc_id": "7", "context": f"[DOC] [TLE] Wall [PAR] {WALL} It was built as", "question": "It was built as",
    "answers": [ANSWER],
}  # fmt: skip


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return load_tokenizer_file(train_sentencepiece(tmp_path_factory.mktemp("qa")))


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def only(path: Path, **options):
    (found,) = read_questions(path, **options)
    return found


def test_a_passage_and_its_question_in_squads_forms(tmp_path, codec):
    """What was the Great Wall built for? The answer is a span of the passage."""
    asked = only(write(tmp_path / "flat.jsonl", FLAT))
    spans = [{"text": text, "answer_start": at} for text, at in zip(*FLAT["answers"].values(), strict=True)]
    question = {"id": "wall", "question": FLAT["question"], "answers": spans}
    article = {"title": "Great Wall", "paragraphs": [{"context": WALL, "qas": [question]}]}
    (tmp_path / "v1.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([FLAT]), tmp_path / "flat.parquet")
    datasets.Dataset.from_list([FLAT]).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"validation": datasets.Dataset.from_list([FLAT])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "local").mkdir()
    write(tmp_path / "local/validation.jsonl", FLAT)
    for name in ("v1.json", "flat.parquet", "saved", "splits", "local"):
        assert only(tmp_path / name) == asked
    assert asked.answers == (ANSWER, "protection") and asked.context[WALL.index(ANSWER) :].startswith(ANSWER)
    assert make_prompt(codec, asked, []) == (
        f"Title: Great Wall\n\nBackground: {WALL}\n\nQuestion: What was it built for?\n\nAnswer:"
    )
    assert make_prompt(codec, asked, [], form="cloze") == f"{WALL} What was it built for?"
    with pytest.raises(UserError, match="has no split 'test'; it has validation"):
        read_questions(tmp_path / "splits", split="test")


def test_unanswerable_questions_of_squad_2_have_no_answer(tmp_path):
    qas = [
        {"id": "1", "question": "Why?", "answers": [{"text": "x", "answer_start": 0}], "is_impossible": False},
        {"id": "2", "question": "Who?", "answers": [], "plausible_answers": [], "is_impossible": True},
    ]
    (tmp_path / "v2.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "x y", "qas": qas}]}]}))
    assert [question.answers for question in read_questions(tmp_path / "v2.json")] == [("x",), ()]


def test_completions_are_taken_as_they_are(tmp_path, codec):
    asked = only(write(tmp_path / "fda.jsonl", FDA))
    assert asked.id == "K1.txt" and asked.answers == ("New device",) and asked.question == "Purpose for submission:"
    assert make_prompt(codec, asked, [], form="question") == FDA["text"]
    squad = {"text": f"{WALL}\n\nIt was built as ", "value": ANSWER, "new_id": "5", "key": "5", "doc_id": "5"}
    assert make_prompt(codec, only(write(tmp_path / "s.jsonl", squad)), []) == f"{WALL}\n\nIt was built as"


def test_cloze_questions_go_on_from_their_text(tmp_path, codec):
    asked = only(write(tmp_path / "drop.jsonl", CLOZE))
    assert make_prompt(codec, asked, []) == f"Wall  {WALL} It was built as"
    for text in ("It stands", "It stands.", "It stands. it WAS built as"):
        asked = only(write(tmp_path / "drop.jsonl", CLOZE | {"context": text}))
        assert make_prompt(codec, asked, []) == "It stands. It was built as"


@pytest.mark.parametrize("room", [80, 100, 150])
def test_a_long_text_is_cut_as_the_literature_does(tmp_path, codec, room):
    filler = " ".join(f"Sentence {i} says nothing." for i in range(60))
    long = {"context": f"{filler} {WALL} {filler}"}
    squad = only(write(tmp_path / "a.jsonl", FLAT | long | {"title": ""}))
    nq = only(write(tmp_path / "b.jsonl", CLOZE | long | {"tok_pos": 3}))
    drop = only(write(tmp_path / "c.jsonl", CLOZE | long))
    fda = only(
        write(tmp_path / "d.jsonl", FDA | {"text": f"{filler}\n{FDA['text'][:-23]}\n{filler}\nPurpose for submission:"})
    )
    plain = only(write(tmp_path / "e.jsonl", {"text": f"{filler} {filler} the last word is", "value": "is"}))
    for asked, kept, kind in (
        (squad, "protection", "Answer:"),
        (nq, "protection", "It was built as"),
        (drop, "Sentence 0 says", "It was built as"),
        (fda, "Purpose for Submission:", "Purpose for submission:"),
        (plain, "last word", "the last word is"),
    ):
        prompt = make_prompt(codec, asked, [], length=room)
        assert room - 8 < len(codec.encode(prompt)) <= room and kept in prompt and prompt.endswith(kind)
    assert "Sentence 59" in make_prompt(codec, squad, [], keep="tail", length=room)
    with pytest.raises(UserError, match="question wall takes"):
        make_prompt(codec, squad, [], length=20)


def test_examples_come_first_and_are_of_other_texts(codec):
    questions = read_questions(SAMPLE)
    for asked in questions:
        shots = choose_shots(questions, asked, 3, 0)
        prompt = make_prompt(codec, asked, shots)
        *before, last = prompt.split("Title: ")[1:]
        assert len(before) == 3 and asked.context in last and last.endswith("Answer:")
        for shot, part in zip(shots, before, strict=True):
            assert shot.context != asked.context and part.endswith(f"Answer: {shot.answers[0]}\n\n")
        assert len(codec.encode(make_prompt(codec, asked, shots, length=900))) <= 900
    assert choose_shots(questions, questions[0], 3, 0) == choose_shots(questions, questions[0], 3, 0)
    assert choose_shots(questions, questions[0], 3, 0) != choose_shots(questions, questions[0], 3, 1)


def test_the_answers_of_the_sample_are_spans_of_its_passages():
    articles = json.loads(SAMPLE.read_text())["data"]
    spans = [
        (paragraph["context"], answer)
        for article in articles
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
        for answer in asked["answers"]
    ]
    assert len(spans) >= 16
    assert all(context[answer["answer_start"] :].startswith(answer["text"]) for context, answer in spans)
    assert len({asked.id for asked in read_questions(SAMPLE)}) == 16


def test_results_of_a_model_that_reads_and_one_that_does_not(tmp_path, codec, monkeypatch, capsys):
    weights = write_weights(tmp_path / "weights", Taipan(small_config("M S", vocab_size=600)))
    tokenizer, right = train_sentencepiece(tmp_path), {}
    for asked in read_questions(SAMPLE):
        right[asked.question] = asked.answers[-1]

    def reader(model, prompts, *, max_new_tokens, **_):
        texts = [codec.decode(prompt) for prompt in prompts]
        asked = [text.rsplit("Question: ", 1)[1].split("\n")[0] for text in texts]
        return [codec.encode(f" It is {right[question].upper()}.\nAnd more")[:max_new_tokens] for question in asked]

    arguments = [str(weights), "--tokenizer", str(tokenizer), "--data", str(SAMPLE), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(found_again, "generate", reader)
    assert main([*arguments, "--context", "1K", "--shots", "1"]) == 0
    (row,) = json.loads((tmp_path / "out/qa.json").read_text())["rows"]
    assert (row["questions"], row["contains"], row["exact"], row["answer in prompt"]) == (16, 1, 0, 1)
    assert 0.4 < row["f1"] < 0.8 and row["longest"] <= 1024 - 48
    told = [json.loads(line) for line in (tmp_path / "out/qa.jsonl").read_text().splitlines()]
    assert [one["id"] for one in told] == [asked.id for asked in read_questions(SAMPLE)]
    assert told[0]["prediction"] == "It is FOUR." and told[0]["f1"] == pytest.approx(0.5)
    assert "state_of_the_union_qa" in capsys.readouterr().out
    assert SAMPLE.name in (tmp_path / "out/qa.svg").read_text()

    monkeypatch.undo()
    assert main([*arguments, "--samples", "3", "--max-new-tokens", "4", "--context", "150", "--batch", "2"]) == 0
    (row,) = json.loads((tmp_path / "out/qa.json").read_text())["rows"]
    assert row["questions"] == 3 and row["contains"] == 0 and row["cut"] == 3 and row["longest"] <= 146


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("{", "a.json", "is not JSON"),
        ('{"a": 1}\n{', "a.jsonl", "line 2: not JSON"),
        ('{"a": 1}', "a.jsonl", "record 0: its fields a are those of no known format"),
        ('{"context": 3, "question": "q", "answers": ["a"]}', "a.jsonl", "3 is not a text"),
        ('{"context": "c", "question": "q", "answers": []}', "a.jsonl", "none of its 1 questions has an answer"),
        ("[]", "a.json", "holds no records"),
        ("x", "a.parquet", "is not a parquet file"),
        ("x", "a.txt", "is neither a folder nor a file that ends in"),
        (None, "a.json", "cannot be read"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, text, name, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main([str(tmp_path / "no_model"), "--data", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
