"""The nine tasks of the paper's Table 1 (arXiv 2410.18572), as lm-eval 0.4.13 names them.

The paper says that it ran lm-evaluation-harness without examples, and neither its version nor which metric each column
has. The metrics here are those in which models of these sizes are usually reported (the tables of Mamba, arXiv
2312.00752, and its successors): accuracy by the likelihood divided by the answer's length (acc_norm) for HellaSwag, ARC
challenge and OpenBookQA, plain accuracy for the others; TruthfulQA is its multiple choice with several right answers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ZeroShotTask:
    """One of them."""

    column: str  # of the paper's table
    metric: str  # lm-eval's: what the table shows; all metrics are kept
    hub: str  # where its data is on the hub, with its configuration
    configuration: str | None
    split: str  # which is scored
    fields: tuple[str, ...]  # that its records must have


TASKS = {
    "winogrande": ZeroShotTask(
        "Wino.", "acc", "allenai/winogrande", "winogrande_xl", "validation",
        ("sentence", "option1", "option2", "answer"),
    ),
    "piqa": ZeroShotTask("PIQA", "acc", "baber/piqa", None, "validation", ("goal", "sol1", "sol2", "label")),
    "hellaswag": ZeroShotTask(
        "Hella.", "acc_norm", "Rowan/hellaswag", None, "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "arc_easy": ZeroShotTask(
        "ARC-E", "acc", "allenai/ai2_arc", "ARC-Easy", "test", ("question", "choices", "answerKey"),
    ),
    "arc_challenge": ZeroShotTask(
        "ARC-C", "acc_norm", "allenai/ai2_arc", "ARC-Challenge", "test", ("question", "choices", "answerKey"),
    ),
    "openbookqa": ZeroShotTask(
        "OB.", "acc_norm", "allenai/openbookqa", "main", "test", ("question_stem", "choices", "answerKey"),
    ),
    "truthfulqa_mc2": ZeroShotTask(
        "Truth.", "acc", "truthfulqa/truthful_qa", "multiple_choice", "validation", ("question", "mc2_targets"),
    ),
    "race": ZeroShotTask("RACE", "acc", "EleutherAI/race", "high", "test", ("article", "problems")),
    "boolq": ZeroShotTask("BoolQ", "acc", "aps/super_glue", "boolq", "validation", ("passage", "question", "label")),
}  # fmt: skip
