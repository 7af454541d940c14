"""Does selection pay on real text? Models of equal size on equal tokens, through launch/pretrain.py itself.

    python -m experiments.real_text --prepare                 the text: benchmarks/corpus.py, 66M tokens
    python -m experiments.real_text --recipes samba mamba2 paper --seeds 0 1
    python -m experiments.real_text --table

Each run is the network of real_text.yaml (or real_text_deep.yaml) with the layers and the gate of a recipe
(experiments/recipes.py), and becomes a line of OUT (see real_text_score.py and real_text_report.py). A run that
has a result there is skipped, and with --minutes none starts that would not end in time, so all runs can be made over
several calls. With several GPUs each trains one run at a time.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import hardware
from benchmarks.corpus import build_corpus
from benchmarks.in_parts import make_runs, read_results
from experiments.real_text_report import draw_results, read_log, results_table
from experiments.recipes import RECIPES, gate_options
from megatron_taipan.config_text import yaml_text
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.rank_environment import without_rank
from megatron_taipan.programs import exits_cleanly

ROOT = Path(__file__).resolve().parents[1]
MEGABYTES, VOCABULARY = 220, 8192
# Networks by the name of their file. Their sizes are equal: models without attention layers, or with larger ones, have
# more Mamba-2 blocks, or fewer.
PATTERNS = {
    "real_text": {"M": "(M*8)*2", "W": "(M*6 W)*2", "A": "(M*6 A)*2", "S": "(M*6 S)*2", "transformerpp": "A*8"},
    "real_text_deep": {"M": "(M*8)*5", "W": "(M*6 W)*5", "A": "(M*6 A)*5", "S": "(M*6 S)*5", "transformerpp": "A*22"},
}


def real_text_runs(options: argparse.Namespace) -> list[dict]:
    """The runs asked for, each with everything that its outcome depends on."""
    text = f"{options.data.name} {IndexedReader(options.data).fingerprint[:8]}"
    patterns = PATTERNS[options.network]
    network = {} if options.network == "real_text" else {"network": options.network}  # lines from before there were two
    return [
        {
            "recipe": recipe, "seed": seed, "steps": options.steps, "data": text, "overrides": options.overrides,
            "pattern": patterns.get(recipe) or patterns[RECIPES[recipe].attention], "gate": gate_options(recipe),
            **network,
        }
        for seed in options.seeds
        for recipe in options.recipes
    ]  # fmt: skip


def run(what: dict, gpu: str | None, *, prefix: Path, work: Path, keep: bool) -> dict:
    """Trains and scores one model."""
    network = what.get("network", "real_text")
    name = "_".join([network, what["recipe"], str(what["seed"]), str(what["steps"]), *what["overrides"]])
    name = re.sub(r"[^\w.=-]+", "-", name)  # the folder is an override too, and those are YAML
    directory = work / name[:200]
    shutil.rmtree(directory, ignore_errors=True)  # of an earlier call
    directory.mkdir(parents=True)
    gate = [f"model.gate.{option}={yaml_text(value)}" for option, value in what["gate"].items()]
    settings = [
        f"data.train={prefix}", f"checkpoint.dir={directory}", f"model.pattern={what['pattern']}", *gate,
        f"train.seed={what['seed']}", f"data.seed={what['seed']}", f"train.steps={what['steps']}", *what["overrides"],
    ]  # fmt: skip
    began = time.perf_counter()
    call(
        ["launch/pretrain.py", "--config", str(Path(__file__).with_name(f"{network}.yaml")), *settings],
        directory / "said.txt",
        gpu,
    )
    trained = time.perf_counter()
    scored = directory / "score.json"
    call(["-m", "experiments.real_text_score", str(directory), "--out", str(scored)], directory / "said.txt", gpu)
    for path in [] if keep else directory.glob("step_*"):
        shutil.rmtree(path)  # only the scores are needed
    seconds = {"training": round(trained - began, 1), "scoring": round(time.perf_counter() - trained, 1)}
    return {**read_log(directory / "log.jsonl"), **json.loads(scored.read_text(encoding="utf-8")), "seconds": seconds}


def call(program: list[str], said: Path, gpu: str | None) -> None:
    """Runs a program of this repository on one GPU.

    Raises:
        RuntimeError: it failed; with its last lines of output.
    """
    environment = without_rank(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with said.open("a", encoding="utf-8") as file:
        status = subprocess.run(
            [sys.executable, *program], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if status:
        last = said.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
        raise RuntimeError(f"{program[:2]}: status {status}: {' / '.join(last)}")


def prepare_corpus(prefix: Path) -> None:
    """The corpus, a tokenizer of it, and its tokens, made once."""
    if prefix.with_suffix(".idx").exists():
        return
    prefix.parent.mkdir(parents=True, exist_ok=True)
    corpus, tokenizer = build_corpus(prefix.parent / "corpus", MEGABYTES), prefix.parent / "tokenizer.model"
    program = [sys.executable, "-m", "data_prep"]
    train = ["train-tokenizer", "--input", corpus, "--vocab-size", str(VOCABULARY), "--output", str(tokenizer),
             "--max-bytes", "30000000"]  # fmt: skip
    encode = ["tokenize", "--input", corpus, "--tokenizer", str(tokenizer), "--append-eod", "--output", str(prefix)]
    for arguments in (train, encode):
        subprocess.run([*program, *arguments], check=True, cwd=ROOT)


def gpu_names() -> list[str | None]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them; [None] without a GPU: one run at a time."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return list(names) or [None]


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/real_text/data/text"), help="prefix of the tokens")
    parser.add_argument(
        "--network", choices=PATTERNS, default="real_text", help="file beside this one; default: %(default)s"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME",
                        help=f"of {', '.join(RECIPES)}; default: all")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1145, help="optimizer steps of 131,072 tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/real_text/results.jsonl"), help="file of the results")
    parser.add_argument("--work", type=Path, default=Path("runs/real_text/work"), help="folder of the runs")
    parser.add_argument("--minutes", type=float, help="start no run that would not end by then")
    parser.add_argument("--expect", type=float, default=0.0, help="seconds that a run takes, until one has ended")
    parser.add_argument("--keep", action="store_true", help="keep the trained models in the folders of WORK")
    parser.add_argument("--prepare", action="store_true", help="only make the corpus, its tokenizer and its tokens")
    parser.add_argument("--table", action="store_true", help="print the results, draw them beside OUT, and run nothing")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="options of every run")
    options = parser.parse_args(arguments)
    prefix = options.data.resolve()
    if options.prepare:
        prepare_corpus(prefix)
    elif not options.table:
        if not prefix.with_suffix(".idx").exists():
            raise UserError(f"--data={options.data}: no such .bin/.idx pair; --prepare makes it")
        about, one = hardware(), partial(run, prefix=prefix, work=options.work.resolve(), keep=options.keep)
        left = make_runs(
            options.out, real_text_runs(options), lambda what, gpu: one(what, gpu) | {"about": about}, options.minutes,
            devices=gpu_names(), expected=options.expect,
        )  # fmt: skip
        print(f"{left} of the runs asked for have no result yet", flush=True)
    if not options.prepare:
        records = read_results(options.out)
        print(results_table(records))
        if options.table:
            print("pictures:", *map(str, draw_results(records, options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
