"""Prompts of questions about a text, as the literature has them, cut to a context length.

question    "Title: T\\n\\nBackground: CONTEXT\\n\\nQuestion: Q\\n\\nAnswer:", lm-eval's squadv2; for SQuAD's questions
cloze       "CONTEXT. Q", the text without its last full stop and without a copy of Q at its end; TriviaQA's marks
            [PAR], [DOC], [TLE] are left out (HazyResearch/prefix-linear-attention,
            lm-eval-harness/lm_eval/tasks/based_triviaqa/task.py; arXiv 2402.18668, 2407.05483)
completion  the text as it is, without white space at its ends (lm-eval 0.4.13's swde, fda, squad_completion)
"""

import random
import re
from collections.abc import Sequence

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.qa_formats import CLOZE, COMPLETION, SQUAD, Question
from megatron_taipan.tokenizer.base import Tokenizer

FORMS = {SQUAD: "question", CLOZE: "cloze", COMPLETION: "completion"}
KEEP = ("auto", "around", "head", "tail")
BETWEEN = "\n\n"  # examples and the question


def fill(asked: Question, context: str, form: str) -> str:
    """The prompt of a question with (a part of) its context."""
    if form == "completion":
        return (context + asked.question).strip()
    question = asked.question.strip()
    if form == "question":
        title = f"Title: {asked.title}\n\n" if asked.title else ""
        return f"{title}Background: {context}\n\nQuestion: {question}\n\nAnswer:"
    context = re.sub(r"\[PAR\]|\[DOC\]|\[TLE\]", "", context.strip())
    while question and context.lower().endswith(question.lower()):
        context = context[: -len(question)]
    return f"{context.strip().strip('.')}. {question}"


def form_of(asked: Question, wanted: str) -> str:
    """The form of a question's prompt: that of its data, or the wanted one; a completion has only its own."""
    natural = FORMS[asked.form]
    return natural if wanted == "auto" or natural == "completion" else wanted


def make_prompt(
    tokenizer: Tokenizer, asked: Question, shots: Sequence[Question], *, form: str = "auto", keep: str = "auto",
    length: int | None = None,
) -> str:  # fmt: skip
    """Examples with their answers, then the question.

    Args:
        form: question, cloze, or auto.
        keep: what is kept of a context that is too long, see `cut`.
        length: most tokens of the prompt; every part has an equal share of it. None: nothing is cut.

    Raises:
        UserError: a question without any context does not fit.
    """
    share = None if length is None else length // (len(shots) + 1)
    parts = []
    for shot in shots:
        answer = f" {shot.answers[0]}{BETWEEN}"
        room = None if share is None else share - len(tokenizer.encode(answer))
        parts.append(fit(tokenizer, shot, form_of(shot, form), keep, room) + answer)
    parts.append(fit(tokenizer, asked, form_of(asked, form), keep, share))
    return "".join(parts)


def fit(tokenizer: Tokenizer, asked: Question, form: str, keep: str, length: int | None) -> str:
    """The prompt of one question in at most `length` tokens: its context is cut, its question never."""
    whole = fill(asked, asked.context, form)
    if length is None or len(tokenizer.encode(whole)) <= length:
        return whole
    room = length - len(tokenizer.encode(fill(asked, "", form)))
    while room > 0:
        prompt = fill(asked, cut(tokenizer, asked, keep, room), form)
        excess = len(tokenizer.encode(prompt)) - length
        if excess <= 0:
            return prompt
        room -= excess  # the parts together can take other tokens than each alone
    raise UserError(
        f"question {asked.id} takes {length - room} tokens or more without its text, and {length} are there for both;"
        " choose a larger --context or fewer --shots"
    )


def cut(tokenizer: Tokenizer, asked: Question, keep: str, length: int) -> str:
    """At most `length` tokens of a question's context.

    Args:
        keep: `around`: as many tokens before the first place of an answer, or of a completion's key, as after it;
            `head`, `tail`: the first or last tokens; `auto`: around, but the head for cloze questions, unless they are
            NQ's, and the tail for completions whose question is not apart from the text. This is what
            HazyResearch/prefix-linear-attention does (lm-eval-harness, `--cutting_context`, from 2,048 tokens).
    """
    if keep == "auto":
        keep = "around" if asked.around_answer else "head"
        if asked.form == COMPLETION and not asked.question:
            keep = "tail"
    ids, parts = tokenizer.encode_with_bytes(asked.context)
    if len(ids) <= length:
        return asked.context
    first = 0 if keep == "head" else len(ids) - length
    if keep == "around":
        place, before = first_place(asked), 0
        while before < len(ids) and place > 0:
            place -= len(parts[before])
            before += 1
        first = min(max(0, before - length // 2), first)
    return b"".join(parts[first : first + length]).decode(errors="ignore")  # half a character at an end is left out


def first_place(asked: Question) -> int:
    """Bytes before the first place where an answer, or the key, stands in the context; 0 where none does."""
    words = [*asked.answers, asked.key] if asked.form == COMPLETION else asked.answers
    found = [re.search(re.escape(word), asked.context, re.IGNORECASE) for word in words if len(word) > 1]
    places = [match.start() for match in found if match]
    return len(asked.context[: min(places)].encode()) if places else 0


def choose_shots(questions: Sequence[Question], asked: Question, count: int, seed: int) -> list[Question]:
    """Other questions that have an answer, about other texts, drawn for each question by itself.

    Raises:
        UserError: there are not enough of them.
    """
    others = [q for q in questions if q.answers and q.context != asked.context and q.id != asked.id]
    if len(others) < count:
        raise UserError(f"--shots={count}: question {asked.id} has {len(others)} others about other texts")
    return random.Random(f"{seed} {asked.id}").sample(others, count)
