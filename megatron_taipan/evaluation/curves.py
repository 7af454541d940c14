"""`python -m megatron_taipan.evaluation curves RUN [RUN ...] --out FOLDER`: how training went, from the runs' logs.

Draws the loss in training and validation, and the share of the tokens that each gate selected, and prints where each
run ended. Needs no checkpoint, only log.jsonl; what a resumed run took again counts as it came later.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from megatron_taipan.checkpoint.run_log import Course, Record, read_course
from megatron_taipan.evaluation.figures import Curve, write_curves
from megatron_taipan.evaluation.results import Row, markdown_table, write_results
from megatron_taipan.layer_kinds.metrics import logged
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly

LAST = 50  # steps at the end of a run whose mean the table gives
SET_MARKERS = "s^vDP*"  # matplotlib's, of validation sets by name
POINTS = 200  # of a curve; each is the mean over as many steps as that takes


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m megatron_taipan.evaluation curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="runs' folders of checkpoints, with log.jsonl in them")
    parser.add_argument("--out", type=Path, required=True, help="folder for curves.json, .md and pictures")
    options = parser.parse_args(arguments)
    courses = {str(path): read_course(path) for path in options.runs}
    rows = [describe(name, course) for name, course in courses.items()]
    losses: list[Curve] = []
    shares: list[Curve] = []
    for number, (name, course) in enumerate(courses.items()):
        losses += loss_curves(name, course, f"C{number}")
        shares += share_curves(name if len(courses) > 1 else "", course, len(shares))
    write_results(
        options.out, "curves", rows, about={"training loss": f"mean of the last {LAST} steps"}, title="Training"
    )
    pictures = {"curves.svg": (losses, "cross entropy (nats a token)")}
    if shares:
        pictures["curves_selected.svg"] = (shares, "share of the tokens selected")
    for file, (curves, words) in pictures.items():
        write_curves(options.out / file, curves, x="step", y=words)
    print(markdown_table(rows))
    for file in pictures:
        print(f"wrote {options.out / file}")
    return 0


def describe(name: str, course: Course) -> Row:
    """Where a run ended; None where it measured nothing, or nothing finite."""
    last = course.steps[-LAST:]
    valid = [record for record in course.valid if record.get("ce") is not None]
    return {
        "run": name,
        "steps": course.steps[-1]["step"],
        "tokens": sum(record["tokens"] for record in course.steps),
        "training loss": mean([record.get("ce") for record in last]),
        "validation loss": valid[-1]["ce"] if valid else None,
        "at step": valid[-1]["step"] if valid else None,
        "selected in training": mean([mean_share(record) for record in last]),
        "selected in validation": mean_share(valid[-1]) if valid else None,
    }


def loss_curves(name: str, course: Course, colour: str) -> list[Curve]:
    """Training as a line, validation as points, in one colour; validation sets by name each with their own marks."""
    curves = [Curve(f"{name}, training", *averaged(course.steps, lambda record: record.get("ce")), f"{colour}-")]
    if points := [(r["step"], r["ce"]) for r in course.valid if r.get("ce") is not None]:
        steps, losses = zip(*points, strict=True)
        curves.append(Curve(f"{name}, validation", steps, losses, f"{colour}o--"))
    for number, of_set in enumerate(dict.fromkeys(of_set for r in course.valid for of_set in r.get("sets", {}))):
        with_it = [(r["step"], r["sets"][of_set].get("ce")) for r in course.valid if of_set in r.get("sets", {})]
        if points := [(step, loss) for step, loss in with_it if loss is not None]:
            steps, losses = zip(*points, strict=True)
            marker = SET_MARKERS[number % len(SET_MARKERS)]
            curves.append(Curve(f"{name}, {of_set}", steps, losses, f"{colour}{marker}:"))
    return curves


def share_curves(name: str, course: Course, first: int) -> list[Curve]:
    """What each gate selected in training, a line a layer, and in validation, points; colours count from `first`."""
    curves = []
    for number, layer in enumerate(dict.fromkeys(layer for r in course.steps for layer in logged(r, "selected"))):
        colour, label = f"C{(first + number) % 10}", " ".join(filter(None, [name, layer]))
        curves.append(
            Curve(label, *averaged(course.steps, lambda r, of=layer: logged(r, "selected").get(of)), f"{colour}-")
        )
        held_out = [(r["step"], logged(r, "selected").get(layer)) for r in course.valid]
        if points := [(step, share) for step, share in held_out if share is not None]:
            steps, values = zip(*points, strict=True)
            curves.append(Curve(f"{label}, validation", steps, values, f"{colour}o"))
    return curves


def averaged(steps: list[Record], value) -> tuple[list[float], list[float]]:
    """Steps and means of `value` of a record over at most POINTS stretches; where a value is None it does not count."""
    x, y = [], []
    for part in stretches(steps):
        found = mean([value(record) for record in part])
        if found is not None:
            x.append(part[-1]["step"])
            y.append(found)
    return x, y


def stretches(steps: list[Record]) -> Iterator[list[Record]]:
    """Consecutive parts of the steps, of equal length but for the last."""
    length = max(1, -(-len(steps) // POINTS))
    return (steps[at : at + length] for at in range(0, len(steps), length))


def mean_share(record: Record) -> float | None:
    """The share selected, mean over the layers with a gate; None without any."""
    return mean(list(logged(record, "selected").values()))


def mean(values: list[float | None]) -> float | None:
    """The mean of those that there are; None without any."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


if __name__ == "__main__":
    sys.exit(main())
