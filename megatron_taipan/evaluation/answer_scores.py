"""How right the answer of a question is: containment, and SQuAD's exact match and F1.

Containment is the measure of the recall literature (arXiv 2402.18668, appendix; lm-eval's tasks fda, swde and
squad_completion): whether one of the right answers occurs in what was generated, upper and lower case alike. Exact
match and F1 are those of SQuAD's official script (evaluate-v2.0.py), the best over the right answers: they also count
what is said besides, which a model that goes on after its answer loses.
"""

import re
import string
from collections import Counter


def contains(prediction: str, answers: list[str]) -> bool:
    """Whether an answer occurs in the prediction."""
    return any(re.search(re.escape(answer.strip()), prediction, re.IGNORECASE) for answer in answers)


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, with single blanks between words (evaluate-v2.0.py)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(prediction: str, answers: list[str]) -> bool:
    """Whether the normalized prediction is an answer."""
    return any(normalize(prediction) == normalize(answer) for answer in answers)


def f1(prediction: str, answers: list[str]) -> float:
    """The harmonic mean of precision and recall in words, of the answer where it is largest."""
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    same = sum((Counter(said) & Counter(wanted)).values())
    return 2 * same / (len(said) + len(wanted))
