"""A few made records of each of the nine tasks, with the fields and types that their data sets have on the hub."""

from pathlib import Path
from typing import Any

import datasets

from megatron_taipan.evaluation.zero_shot_tasks import TASKS

CHOICES = {"text": ["a wall", "a river", "a storm", "a gate"], "label": ["A", "B", "C", "D"]}
RECORDS: dict[str, list[dict[str, Any]]] = {
    "winogrande": [
        {"sentence": "The wall held but the gate broke, so _ was mended.", "option1": "the wall", "option2": "the gate",
         "answer": "2"},
        {"sentence": "Ann thanked Sue because _ had helped.", "option1": "Ann", "option2": "Sue", "answer": "2"},
    ],
    "piqa": [
        {"goal": "keep bread fresh", "sol1": "put it in a bag", "sol2": "put it in a bath", "label": 0},
        {"goal": "open a door", "sol1": "paint it", "sol2": "turn the handle", "label": 1},
    ],
    "hellaswag": [
        {"activity_label": "Baking", "ctx_a": "She mixes flour.", "ctx_b": "she", "ctx": "She mixes flour. she",
         "endings": ["adds water.", "flies away.", "sings.", "reads a map."], "label": "0"},
    ],
    "arc_easy": [{"id": "1", "question": "What holds water?", "choices": CHOICES, "answerKey": "B"}],
    "arc_challenge": [{"id": "2", "question": "What lets people in?", "choices": CHOICES, "answerKey": "D"}],
    "openbookqa": [{"id": "3", "question_stem": "Rain comes with", "choices": CHOICES, "answerKey": "C"}],
    "truthfulqa_mc2": [
        {"question": "Is the wall seen from the moon?", "mc1_targets": {"choices": ["No", "Yes"], "labels": [1, 0]},
         "mc2_targets": {"choices": ["No", "It is not", "Yes"], "labels": [1, 1, 0]}},
    ],
    "race": [
        {"article": "The wall is long. It took years to build.",
         "problems": "[{'question': 'How is the wall?', 'answer': 'A', 'options': ['long', 'red', 'new', 'low']},"
         " {'question': 'It took  _  .', 'answer': 'C', 'options': ['hours', 'days', 'years', 'weeks']}]"},
    ],
    "boolq": [
        {"question": "is the wall long", "passage": "The wall is long.", "idx": 0, "label": 1},
        {"question": "is the wall red", "passage": "The wall is grey.", "idx": 1, "label": 0},
    ],
}  # fmt: skip


def write_tasks(folder: Path) -> None:
    """One folder a task, in each of the forms that are read: saved by `datasets`, or files named by their split."""
    for number, (task, records) in enumerate(RECORDS.items()):
        data = datasets.DatasetDict({TASKS[task].split: datasets.Dataset.from_list(records)})
        place = folder / task
        if number % 2:
            data.save_to_disk(str(place))
        else:
            place.mkdir(parents=True)
            data[TASKS[task].split].to_parquet(str(place / f"{TASKS[task].split}.parquet"))
