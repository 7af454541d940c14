"""`python -m megatron_taipan.evaluation report MODEL [MODEL ...] --out FOLDER`: all results in one HTML page.

Puts the tables and pictures that the other tasks left in FOLDER into FOLDER/report.html, after what the models consist
of: parameters, operations, weights and decoding state by kind of layer. Tasks without a result are listed with their
command. The page needs no other file, no network and no script. Run it again after another task.
"""

import argparse
import base64
import json
import sys
import time
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_taipan.checkpoint.files import write_text
from megatron_taipan.checkpoint.weights import CheckpointWeights, open_weights
from megatron_taipan.errors import UserError, writing
from megatron_taipan.evaluation.decode_timing import cache_bytes_by_layer
from megatron_taipan.evaluation.lengths import parse_length
from megatron_taipan.evaluation.results import Row, cell_text, made_by
from megatron_taipan.evaluation.selection_page import STYLE
from megatron_taipan.layer_kinds.registry import kind_of
from megatron_taipan.model.flops import head_flops, layer_flops, layer_params, model_flops, model_params
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly
from megatron_taipan.untrusted import parse_json

PAGE = "report.html"
WITHOUT_RESULTS = ("calibrate", "passkey", "report")  # tasks that leave nothing in a folder
ARGUMENTS = {  # of a task's command, where they are not `MODELS --out FOLDER`
    "perplexity": "{models} --lengths 1K,4K,...,64K --out {out}",
    "selection": "{model} --text FILE --json {out}/selection.json --out {out}/selection.html",
    "qa": "{models} --data FILE --out {out}",
    "zero-shot": "{models} --data FOLDER --out {out}",
}

NEEDS = {  # what a task that was not run needs besides the models
    "zero-shot": "needs lm_eval (pip install --constraint constraints.txt '.[eval]'), and the tasks' data in FOLDER",
}


class Found(NamedTuple):
    """What a task left in the folder."""

    tables: list[tuple[dict[str, Any], str]]  # records of .json files, and the day of each
    pictures: list[Path]  # .svg
    texts: list[Path]  # .md of which there is no .json


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m megatron_taipan.evaluation report", description=__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="checkpoints, runs' folders or exported folders")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of the results; {PAGE} is written there")
    parser.add_argument("--title", default="Evaluation", help="heading of the page")
    parser.add_argument("--context", help="tokens that sizes are given for; default: as in training, else 4K")
    options = parser.parse_args(arguments)
    from megatron_taipan.evaluation.__main__ import TASKS

    given = parse_length(options.context) if options.context else None
    models = [model_section(path, given) for path in options.models]
    tasks = {task: words for task, words in TASKS.items() if task not in WITHOUT_RESULTS}
    found = {task: find_results(options.out, task, list(tasks)) for task in tasks}
    sections = [task_section(task, tasks[task], results) for task, results in found.items() if results]
    missing = [(task, command_of(task, options.models, options.out)) for task, results in found.items() if not results]
    with writing(options.out / PAGE):
        options.out.mkdir(parents=True, exist_ok=True)
        write_text(options.out / PAGE, make_page(options.title, models + sections, missing))
    print(f"wrote {options.out / PAGE}: {len(sections)} tasks with results, {len(missing)} without")
    return 0


def model_section(path: Path, context: int | None) -> str:
    """What a model consists of.

    Raises:
        UserError: the path holds no weights.
    """
    opened = open_weights(path)
    trained = [f"pattern {opened.network.pattern}, d_model {opened.network.d_model}"]
    if isinstance(opened, CheckpointWeights):
        trained.append(f"step {opened.step:,}, {opened.tokens:,} tokens, samples of {opened.config.data.seq_len:,}")
    context = context or opened.training_length or 4096
    rows = parts_of(opened.network, context)
    words = f"{'; '.join(trained)}. Operations are of a forward pass of {context:,} tokens, the state is of as many."
    return f"<h2>{escape(str(path))}</h2>\n<p>{escape(words)}</p>\n{html_table(rows)}"


def parts_of(network: ModelConfig, context: int) -> list[Row]:
    """Sizes by kind of layer, of the rest, and in all.

    Columns besides the part: layers, parameters, MFLOP a token forward in documents of `context` tokens
    (model/flops.py), MiB of the weights in 16 bits, and MiB of the decoding state of one row after `context` tokens,
    keys, values and convolution inputs in 16 bits.
    """
    with torch.device("meta"):
        model = Taipan(network).bfloat16()
    states = cache_bytes_by_layer(model, context)
    counts = Counter(network.letters)
    rows = []
    for letter, layers in counts.items():
        places = [i for i, at in enumerate(network.letters) if at == letter]
        parameters = sum(layer_params(network, i) for i in places)
        flops = layers * layer_flops(network, letter, context)
        rows.append(
            _part(f"{kind_of(letter).name}s ({letter})", layers, parameters, flops, sum(states[i] for i in places))
        )
    whole = model_params(network)
    rest = whole - sum(row["parameters"] for row in rows)
    rows.append(_part("embedding, final norm, head", None, rest, head_flops(network), 0))
    rows.append(_part("all", network.n_layers, whole, model_flops(network, context), sum(states)))
    return rows


def _part(name: str, layers: int | None, parameters: int, flops: float, state: int) -> Row:
    return {
        "part": name, "layers": layers, "parameters": parameters, "MFLOP a token": flops / 1e6,
        "weights, MiB": 2 * parameters / 2**20, "state, MiB": state / 2**20,
    }  # fmt: skip


def find_results(folder: Path, task: str, tasks: list[str]) -> Found | None:
    """The files of a task: TASK and TASK_*, but for those of a task with a longer name; None where there are none.

    Raises:
        UserError: a .json is damaged.
    """

    def own(file: Path) -> bool:
        stem = file.stem.replace("-", "_")
        names = [name for name in (t.replace("-", "_") for t in tasks) if stem == name or stem.startswith(f"{name}_")]
        return bool(names) and max(names, key=len) == task.replace("-", "_")

    tables, jsons = [], [file for file in sorted(folder.glob("*.json")) if own(file)]
    for file in jsons:
        try:
            record = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}; remove it, or run the task again") from error
        if not isinstance(record, dict):
            raise UserError(f"{file} holds no result of a task (an object); remove it, or run the task again")
        changed = time.strftime("%Y-%m-%d", time.localtime(file.stat().st_mtime))
        made = record.get("made")
        tables.append((record, str(made.get("date", changed)) if isinstance(made, dict) else changed))
    pictures = [file for file in sorted(folder.glob("*.svg")) if own(file)]
    texts = [file for file in sorted(folder.glob("*.md")) if own(file) and not file.with_suffix(".json").exists()]
    return Found(tables, pictures, texts) if tables or pictures or texts else None


def task_section(task: str, answers: str, found: Found) -> str:
    """A task's tables and pictures."""
    parts = [f"<h2>{escape(task)}</h2>\n<p>{escape(answers[:1].upper() + answers[1:])}</p>"]
    for picture in found.pictures:
        # as an image: it can run nothing, and the names inside of two pictures do not meet
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<p><img alt="{escape(picture.stem)}" src="data:image/svg+xml;base64,{data}"></p>')
    for record, date in found.tables:
        rows = layers_as_columns(record) if "groups" in record else record.get("rows")
        facts = {k: v for k, v in record.items() if k not in ("task", "title") and isinstance(v, str | int | float)}
        about = {"date": date} | as_dict(record.get("made")) | as_dict(record.get("about")) | facts
        told = "; ".join(f"{name}: {value}" for name, value in about.items())
        parts.append(f"<h3>{escape(str(record.get('title', task)))}</h3>\n<p class='faint'>{escape(told)}</p>")
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            parts.append(html_table(rows))
        else:
            parts.append(f"<pre>{escape(json.dumps(record, indent=1, ensure_ascii=False))}</pre>")
    parts += [f"<pre>{escape(text.read_text(encoding='utf-8', errors='replace'))}</pre>" for text in found.texts]
    return "\n".join(parts)


def layers_as_columns(record: dict[str, Any]) -> Any:
    """The rows of selection.json, where `shares` of a group has one number a layer; as they are where they are not."""
    groups, layers = record["groups"], record.get("layers")
    if not isinstance(groups, list) or not isinstance(layers, list):
        return groups
    rows = []
    for group in map(as_dict, groups):
        shares = group.get("shares")
        by_layer = zip(layers, shares if isinstance(shares, list) else [], strict=False)
        rest = {name: value for name, value in group.items() if name != "shares"}
        rows.append(rest | {f"layer {layer}": share for layer, share in by_layer})
    return rows


def as_dict(value: Any) -> dict[str, Any]:
    """A part of a record that should be an object."""
    return value if isinstance(value, dict) else {}


def html_table(rows: list[Row]) -> str:
    """Rows as a table; columns without any value are left out."""
    columns = [
        name for name in dict.fromkeys(n for row in rows for n in row) if any(row.get(name) is not None for row in rows)
    ]
    head = "".join(f"<th>{escape(str(name))}</th>" for name in columns)
    lines = ["".join(f"<td>{escape(cell_text(row.get(name)))}</td>" for name in columns) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def command_of(task: str, models: list[Path], out: Path) -> str:
    """How to run a task, its results into the page's folder."""
    arguments = ARGUMENTS.get(task, "{models} --out {out}")
    words = arguments.format(models=" ".join(map(str, models)), model=models[0], out=out)
    return f"python -m megatron_taipan.evaluation {task} {words}"


def make_page(title: str, sections: list[str], missing: list[tuple[str, str]]) -> str:
    """The whole file."""
    now = made_by()
    told = f"{now['date']}, megatron_taipan {now['megatron_taipan']}, torch {now['torch']}"
    todo = "\n".join(
        f"<li>{escape(task)}: <code>{escape(command)}</code> {escape(NEEDS.get(task, ''))}</li>"
        for task, command in missing
    )
    rest = f"<h2>Not run</h2>\n<ul>\n{todo}\n</ul>\n<p class='faint'>--help says what else a task takes.</p>"
    body = "\n".join([*sections, *([rest] if missing else [])])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{STYLE}img {{ max-width: 100%; background: #fff; }}
pre {{ overflow-x: auto; }}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="faint">{escape(told)}</p>
{body}
</body>
</html>
"""


if __name__ == "__main__":
    sys.exit(main())
