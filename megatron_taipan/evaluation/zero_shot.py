"""`python -m megatron_taipan.evaluation zero-shot MODEL ... --data FOLDER`: the nine tasks of the paper, by lm-eval.

FOLDER has one folder a task, named as lm-eval names it (winogrande, piqa, hellaswag, arc_easy, arc_challenge,
openbookqa, truthfulqa_mc2, race, boolq), as `datasets` saves it with save_to_disk or as a copy of its repository on the
hub; nothing is asked of the network. lm-eval loads an exported folder through transformers; a checkpoint is exported to
a temporary one first. Needs lm_eval: pip install --constraint constraints.txt '.[eval]'.

The result has lm-eval's names and versions of the tasks and all of their metrics; `score` is the one of the table.
"""

import argparse
import importlib.util
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_taipan.checkpoint.weights import ExportedWeights, open_weights
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.local_data import load_folder, without_network
from megatron_taipan.evaluation.results import Row, describe_options, make_folder, markdown_table, write_results
from megatron_taipan.evaluation.text_models import TextModel, add_model_arguments, find_models
from megatron_taipan.evaluation.zero_shot_tasks import TASKS
from megatron_taipan.inference.loading import parse_device
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly

SHORTEST_CONTEXT = 2048  # tokens; lm-eval cuts the beginning of what is longer. A model trained on more takes more
SPLIT_KEYS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # as lm-eval names them


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    options = parse_options(arguments)
    require_lm_eval()
    data = {task: load_task(options.data, task) for task in options.tasks}
    models = find_models(options)
    make_folder(options.out)
    rows: list[Row] = []
    about = describe_options(options)
    for model in models:
        with exported(model, options) as folder:
            found = run_harness(folder, data, options, max(model.training_length or 0, SHORTEST_CONTEXT))
        rows += result_rows(model.name, found)
        about["lm_eval"] = found["lm_eval"]
    if options.out is not None:
        write_results(options.out, "zero-shot", rows, about=about, title="Zero-shot tasks")
        draw_figures(options.out, rows)
    print(markdown_table(rows))
    return 0


def draw_figures(folder: Path, rows: list[Row]) -> None:
    """The score of each task, and their mean, by model."""
    from megatron_taipan.evaluation.figures import write_bars

    write_bars(folder / "zero-shot.svg", rows, group="task", value="score", x="task", y="score", y_range=(0.0, 1.0))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        UserError: one of them cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_taipan.evaluation zero-shot", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder a task")
    parser.add_argument("--tasks", default=",".join(TASKS), help="lm-eval's names; default: all nine")
    parser.add_argument("--limit", type=int, help="only the first questions of each task, to try it out")
    parser.add_argument("--batch", type=int, default=8, help="rows per forward pass")
    parser.add_argument("--out", type=Path, help="folder for zero-shot.json, .md and .svg")
    options = parser.parse_args(arguments)
    options.tasks = [word.strip() for word in options.tasks.split(",")]
    unknown = [task for task in options.tasks if task not in TASKS]
    if unknown:
        raise UserError(f"--tasks: {unknown[0]!r} is none of {', '.join(TASKS)}")
    for name in ("limit", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    return options


def require_lm_eval() -> None:
    """Raises UserError where lm_eval, or accelerate, which its hf model imports, is not installed."""
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"zero-shot needs {' and '.join(missing)}: pip install --constraint constraints.txt '.[eval]' (in a"
            " checkout), or pip install 'lm_eval==0.4.13' accelerate"
        )


def load_task(folder: Path, task: str) -> dict[str, Any]:
    """The splits of a task's data.

    Raises:
        UserError: they are not there, or do not have the fields that lm-eval reads.
    """
    wanted, place = TASKS[task], folder / task
    source = wanted.hub + (f" ({wanted.configuration})" if wanted.configuration else "")
    if not place.is_dir():
        raise UserError(f"--data {folder} has no folder {task}; save {source} there, or leave the task out of --tasks")
    data = load_folder(place, wanted.configuration)
    if list(data) == ["train"]:  # what `datasets` calls the only file of a folder
        data = {wanted.split: data["train"]}
    if wanted.split not in data:
        raise UserError(f"{place} has the splits {', '.join(data)}, and {task} is scored on {wanted.split}")
    missing = [name for name in wanted.fields if name not in data[wanted.split].column_names]
    if missing:
        raise UserError(f"{place}: its records have no {', '.join(missing)}, as those of {source} have")
    return data


@contextmanager
def exported(model: TextModel, options: argparse.Namespace) -> Iterator[Path]:
    """A folder that transformers loads: the model's own, or an export of a checkpoint that is removed afterwards.

    Raises:
        UserError: the checkpoint cannot be exported, or the folder has no tokenizer.
    """
    if isinstance(open_weights(model.path), ExportedWeights):
        if options.tokenizer is not None:
            raise UserError(
                f"{model.name} is an exported folder, and lm-eval reads the tokenizer in it: leave out --tokenizer, or"
                " export the folder again with it (python -m checkpoints.export_hf)"
            )
        yield model.path
        return
    with tempfile.TemporaryDirectory(prefix="taipan-zero-shot-") as place:
        folder = Path(place) / "hf"
        command = [sys.executable, "-m", "checkpoints.export_hf", str(model.path), str(folder)]
        command += ["--dtype", options.dtype, *(["--ema"] if model.ema else [])]
        if options.tokenizer is not None:
            command += ["--tokenizer", str(options.tokenizer)]
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise UserError(f"{model.name} cannot be exported for lm-eval: {said[-1].removeprefix('error: ')}")
        sys.stderr.write(done.stderr)  # what the export remarks on, such as gates that select far from training
        yield folder


def run_harness(
    folder: Path, data: dict[str, dict[str, Any]], options: argparse.Namespace, max_length: int
) -> dict[str, Any]:
    """lm-eval's results of an exported folder on the tasks, without examples, and its version as `lm_eval`.

    Args:
        data: the splits by task; lm-eval's own definition of the task does the rest.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    def task_of(task: str) -> dict[str, Any]:
        # without examples the other splits are not read, and need not be there
        absent = [key for key, split in SPLIT_KEYS.items() if split not in data[task]]
        return {"task": task, "custom_dataset": lambda **_: data[task], **dict.fromkeys(absent)}

    logger = logging.getLogger("lm_eval")
    with without_network():
        logger.setLevel(logging.ERROR)  # else every task with data of its own is remarked on
        loaded = TaskManager().load({"group": "zero_shot", "task": [task_of(task) for task in data]})
        logger.setLevel(logging.WARNING)
        found = simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(folder),
                "trust_remote_code": True,
                "dtype": DTYPES[options.dtype],
                "max_length": max_length,
            },  # fmt: skip
            tasks=list(loaded["tasks"].values()),
            num_fewshot=0,
            batch_size=options.batch,
            device=str(parse_device(options.device)),
            limit=options.limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    assert found is not None  # only other ranks get None
    return dict(found) | {"lm_eval": version("lm_eval")}


def result_rows(model: str, found: dict[str, Any]) -> list[Row]:
    """Rows of the table from lm-eval's results; the last is the mean of the scores."""
    rows: list[Row] = []
    for task, wanted in TASKS.items():
        if task not in found["results"]:
            continue
        metrics = found["results"][task]
        rows.append(
            {
                "model": model, "task": task, "version": found["versions"][task], "column": wanted.column,
                "questions": found["n-samples"][task]["effective"], "metric": wanted.metric,
                "score": metrics[f"{wanted.metric},none"], "acc": metrics.get("acc,none"),
                "acc_norm": metrics.get("acc_norm,none"),
            }
        )  # fmt: skip
    mean = sum(row["score"] for row in rows) / len(rows)
    blank = dict.fromkeys(rows[0]) | {"model": model, "task": f"mean of {len(rows)}", "score": mean}
    return [*rows, blank]


if __name__ == "__main__":
    sys.exit(main())
