"""Questions about a text, from the fields of the public data sets.

SQuAD, v1.1 and v2.0    {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]},
                        rajpurkar.github.io/SQuAD-explorer; and flat, as `datasets` has it: id, title, context,
                        question, answers {"text": [...], "answer_start": [...]}
completion              text, which ends where the answer begins, and value; with key, doc_id, file_name: SWDE, FDA
                        and SQuAD as hazyresearch/based-swde, based-fda and based-squad on the hub have them
                        (arXiv 2402.18668; read by lm-eval's tasks swde, fda and squad_completion)
cloze                   context, question (the beginning of a sentence that the answer ends) and answers, a list of
                        texts: DROP, TriviaQA and NQ as hazyresearch/based_drop, based_triviaqa and based_nq_1024
                        have them (arXiv 2407.05483; its lm-eval-harness/lm_eval/tasks/based_*)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.local_data import Record, read_records

SQUAD, COMPLETION, CLOZE = "squad", "completion", "cloze"


@dataclass(frozen=True)
class Question:
    """One question about a text."""

    id: str
    form: str  # of the three above
    context: str
    question: str  # of a completion: what its text ends with and names the key, or nothing
    answers: tuple[str, ...]  # all right ones; none: the text does not say (SQuAD v2.0)
    title: str = ""
    key: str = ""  # of a completion
    around_answer: bool = True  # where a context that is too long is cut, in the literature


def read_questions(path: Path, split: str | None = None) -> list[Question]:
    """The questions of a file or folder, in their order.

    Raises:
        UserError: it cannot be read, or its fields are of no known format.
    """
    records = read_records(path, split)
    questions = []
    for number, record in enumerate(records):
        try:
            questions += list(_of_record(record, str(number)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{path}, record {number}: its fields {', '.join(sorted(record))} are those of no known format, or one"
                f" of them is not as there ({type(error).__name__}: {error}). Known are SQuAD (paragraphs; or context,"
                " question, answers.text), completions (text, value), cloze (context, question, answers)"
            ) from error
    return questions


def _of_record(record: Record, number: str) -> Iterator[Question]:
    """The questions of one record: several only in SQuAD's own files."""
    if "paragraphs" in record:
        for paragraph in record["paragraphs"]:
            for asked in paragraph["qas"]:
                yield _squad(asked | {"context": paragraph["context"], "title": record.get("title", "")}, number)
    elif "text" in record and "value" in record:
        yield _completion(record, number)
    elif isinstance(record["answers"], list) and all(isinstance(answer, str) for answer in record["answers"]):
        yield Question(
            str(record.get("doc_id", number)), CLOZE, _text(record["context"]), _text(record["question"]),
            _answers(record["answers"]), around_answer="tok_pos" in record,  # NQ has it, see qa_prompts.cut
        )  # fmt: skip
    else:
        yield _squad(record, number)


def _squad(record: Record, number: str) -> Question:
    """A question of SQuAD; its answers as its own files or as `datasets` have them; v2.0's that have none list none."""
    given = record["answers"]
    texts = given["text"] if isinstance(given, dict) else [answer["text"] for answer in given]
    return Question(
        str(record.get("id", number)), SQUAD, _text(record["context"]), _text(record["question"]), _answers(texts),
        title=str(record.get("title") or ""),
    )  # fmt: skip


def _completion(record: Record, number: str) -> Question:
    """A text that ends where the value follows; `key:` at its end is its question."""
    text, key = _text(record["text"]).strip(), str(record.get("key") or "").strip()
    asks = f"{key}:" if key and text.lower().endswith(f"{key}:".lower()) else ""
    cut = len(text) - len(asks)
    name = record.get("new_id", record.get("doc_id", number))
    return Question(str(name), COMPLETION, text[:cut], text[cut:], _answers([record["value"]]), key=key)


def _answers(texts: Any) -> tuple[str, ...]:
    """The right answers, each once, white space at their ends left out."""
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _text(value: Any) -> str:
    """A field that must be text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value
