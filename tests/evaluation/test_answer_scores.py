"""Scores of answers: SQuAD's by cases worked out by hand, containment as lm-eval's tasks have it."""

import pytest

from megatron_taipan.evaluation.answer_scores import contains, exact, f1


@pytest.mark.parametrize(
    ("prediction", "answers", "same", "overlap"),
    [
        ("The Ming dynasty.", ["Ming Dynasty"], True, 1.0),  # case, article and full stop do not count
        ("the Ming", ["the Ming dynasty"], False, 2 / 3),  # 1 of 1 words, 1 of 2: article left out
        ("It was built by the Ming", ["Ming dynasty", "the Ming"], False, 2 / 6),  # 5 words said, 1 of 1 wanted
        ("an anthem", ["anthem"], True, 1.0),  # an article only where it is a word
        ("38,000 persons", ["over 38,000"], False, 0.5),
        ("up-to-date", ["uptodate"], True, 1.0),  # punctuation goes without leaving a blank
        ("wall wall gate", ["wall gate gate"], False, 2 / 3),  # words count as often as both have them
        ("", ["Ming"], False, 0.0),
        ("the", ["a"], True, 1.0),  # nothing is left of either
        ("Qin", ["Ming"], False, 0.0),
    ],
)
def test_exact_match_and_f1(prediction, answers, same, overlap):
    assert exact(prediction, answers) == same
    assert f1(prediction, answers) == pytest.approx(overlap)


def test_containment_ignores_case_and_reads_no_pattern():
    assert contains("It was built in the MING dynasty.", ["Qin", "Ming "])
    assert contains("costs $5.00 (net)", ["$5.00 (net)"])
    assert not contains("costs 5x00", ["5.00"])
    assert not contains("", ["Ming"])
