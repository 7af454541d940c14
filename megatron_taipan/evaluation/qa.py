"""`python -m megatron_taipan.evaluation qa MODEL ... --data FILE ...`: answers to questions, taken from their context.

Reads SQuAD, SWDE, FDA, DROP, TriviaQA and NQ from local files (qa_formats.py has their fields), makes the prompts of
the literature (qa_prompts.py), generates greedily up to the end of the line, and scores by containment, the papers'
measure, and by SQuAD's exact match and F1 (answer_scores.py). Questions whose text has no answer (SQuAD v2.0) are left
out, as there. A folder is read as `datasets` saves it.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from megatron_taipan.checkpoint.files import write_text
from megatron_taipan.errors import UserError, writing
from megatron_taipan.evaluation import answer_scores
from megatron_taipan.evaluation.found_again import reply_in_text
from megatron_taipan.evaluation.lengths import parse_length
from megatron_taipan.evaluation.local_data import to_line
from megatron_taipan.evaluation.qa_formats import Question, read_questions
from megatron_taipan.evaluation.qa_prompts import KEEP, choose_shots, make_prompt
from megatron_taipan.evaluation.results import Row, describe_options, make_folder, markdown_table, write_results
from megatron_taipan.evaluation.text_models import TextModel, add_model_arguments, find_models
from megatron_taipan.inference.selection_watch import watched_selection
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly


class Asked(NamedTuple):
    """A question and its prompt for one model."""

    question: Question
    prompt: str
    ids: list[int]
    cut: bool  # whether the prompt lacks some of the text


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    options = parse_options(arguments)
    sets = {str(path): keep_answerable(path, options) for path in options.data}
    models = find_models(options)
    prompts = {(model.name, data): ask(model, sets[data], options) for model in models for data in sets}
    make_folder(options.out)
    rows, told = [], []
    for model in models:
        network = model.load(options)
        for data in sets:
            with watched_selection(network, f"{model.name} on {data}"):
                answers = list(answer(model, network, data, prompts[model.name, data], options))
            rows.append(summarize(model, data, answers))
            told += answers
        del network  # before the next one is read
    if options.out is not None:
        about = describe_options(options)
        write_results(options.out, "qa", rows, about=about, title="Answers taken from the context")
        with writing(options.out / "qa.jsonl"):
            write_text(options.out / "qa.jsonl", "".join(map(to_line, told)))
        draw_figures(options.out, rows)
    print(markdown_table(rows))
    return 0


def draw_figures(folder: Path, rows: list[Row]) -> None:
    """The papers' measure by data and model."""
    from megatron_taipan.evaluation.figures import write_bars

    files = {row["data"] for row in rows}
    if len({Path(file).name for file in files}) == len(files):  # short enough to stand below the bars
        rows = [row | {"data": Path(row["data"]).name} for row in rows]
    write_bars(
        folder / "qa.svg", rows, group="data", value="contains", x="data", y="answers that contain a right one, share",
        y_range=(0.0, 1.0),
    )  # fmt: skip


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        UserError: one of them cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_taipan.evaluation qa", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_arguments(parser)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help=".json, .jsonl, .parquet files, or folders")
    parser.add_argument("--split", help="of a folder; default: validation, else test, else train")
    parser.add_argument("--samples", type=int, help="the first questions of each file; default: all")
    parser.add_argument("--shots", type=int, default=0, help="other questions with their answers before each")
    parser.add_argument("--context", help="tokens of prompt and answer together, such as 2K: longer texts are cut")
    parser.add_argument("--keep", choices=KEEP, default="auto", help="what of a cut text; auto: as the literature")
    parser.add_argument("--prompt", choices=("auto", "question", "cloze"), default="auto", help="auto: as its data has")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="of an answer, which ends with its line")
    parser.add_argument("--batch", type=int, default=8, help="prompts per pass")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of --shots")
    parser.add_argument("--out", type=Path, help="folder for qa.json, qa.md, qa.svg, and qa.jsonl with every answer")
    options = parser.parse_args(arguments)
    for name, least in (("samples", 1), ("shots", 0), ("max_new_tokens", 1), ("batch", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least {least}")
    options.context = None if options.context is None else parse_length(options.context)
    if options.context is not None and options.context <= options.max_new_tokens:
        raise UserError(
            f"--context={options.context} leaves no room beside --max-new-tokens={options.max_new_tokens}; choose more"
        )
    return options


def keep_answerable(path: Path, options: argparse.Namespace) -> list[Question]:
    """The first questions of a file that have an answer; says how many were left out.

    Raises:
        UserError: none has.
    """
    questions = read_questions(path, options.split)
    answerable = [question for question in questions if question.answers]
    if not answerable:
        raise UserError(f"{path}: none of its {len(questions)} questions has an answer")
    if len(answerable) < len(questions):
        left = len(questions) - len(answerable)
        print(f"{path}: {left} of {len(questions)} questions have no answer and are left out", file=sys.stderr)
    return answerable


def ask(model: TextModel, questions: Sequence[Question], options: argparse.Namespace) -> list[Asked]:
    """The prompts of the first questions, by a model's tokenizer."""
    length = None if options.context is None else options.context - options.max_new_tokens
    asked = []
    for question in questions[: options.samples]:
        shots = choose_shots(questions, question, options.shots, options.seed)
        whole = make_prompt(model.tokenizer, question, shots, form=options.prompt)
        prompt = make_prompt(model.tokenizer, question, shots, form=options.prompt, keep=options.keep, length=length)
        asked.append(Asked(question, prompt, model.tokenizer.encode(prompt), prompt != whole))
    return asked


def answer(
    model: TextModel, network: Taipan, data: str, asked: list[Asked], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """What the model answers and how right it is, in the order of the questions."""
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))  # prompts of one pass are about as long
    replies: dict[int, str] = {}
    with tqdm(total=len(asked), desc=f"{model.name}: {data}", file=sys.stderr, dynamic_ncols=True) as bar:
        for first in range(0, len(order), options.batch):
            some = order[first : first + options.batch]
            prompts = [asked[i].ids for i in some]
            said = reply_in_text(network, model.tokenizer, prompts, options.max_new_tokens)
            replies |= dict(zip(some, said, strict=True))
            bar.update(len(some))
    for i, (question, prompt, ids, cut) in enumerate(asked):
        right, prediction = list(question.answers), first_line(replies[i])
        yield {
            "model": model.name, "data": data, "id": question.id, "answers": right, "prediction": prediction,
            "contains": answer_scores.contains(prediction, right), "exact": answer_scores.exact(prediction, right),
            "f1": answer_scores.f1(prediction, right), "tokens": len(ids), "cut": cut,
            "answer in prompt": answer_scores.contains(prompt, right), "prompt": prompt,
        }  # fmt: skip


def first_line(reply: str) -> str:
    """What stands before the first end of line, where lm-eval's `until` cuts too."""
    return reply.split("\n", 1)[0].strip()


def summarize(model: TextModel, data: str, answers: list[dict[str, Any]]) -> Row:
    """One row of the result; shares from 0 to 1."""
    count = len(answers)
    shares = {name: sum(float(told[name]) for told in answers) / count for name in ("contains", "exact", "f1")}
    in_prompt = sum(told["answer in prompt"] for told in answers) / count
    row: Row = {"model": model.name, "data": data, "questions": count, **shares, "answer in prompt": in_prompt}
    return row | {"cut": sum(told["cut"] for told in answers), "longest": max(told["tokens"] for told in answers)}


if __name__ == "__main__":
    sys.exit(main())
