"""Does selection pay on real text? Models of equal size on equal tokens, through launch/pretrain.py itself.

    python -m launch.experiments.real_text --data runs/real_text/data/text --recipes samba mamba2 paper --seeds 0 1

Each run is the network of real_text.yaml with the layers and gate of a recipe (launch/experiments/recipes.py). Its
result is one line of OUT: loss on held-out documents, also by how far back a token's bigram occurred last
(megatron_taipan/evaluation/recall_tokens.py); loss by length of context; share of tokens selected by layer, in training
and in evaluation; tokens/s. A run whose settings stand in OUT already is skipped, and with --minutes none is begun
that would not end in time, so the whole can be made in parts. With several GPUs each takes a run.

--table prints what OUT holds as Markdown.
"""

import argparse
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.benchmark_common import hardware
from launch.experiments.in_parts import append, key_of, read
from launch.experiments.recipes import RECIPES, gate_options
from megatron_taipan.config import yaml_text
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError, exits_cleanly

ROOT = Path(__file__).resolve().parents[2]
# Equal size: what is left of the attention layers' parameters goes into more Mamba-2 blocks, or fewer.
PATTERNS = {"M": "(M*8)*2", "W": "(M*6 W)*2", "A": "(M*6 A)*2", "S": "(M*6 S)*2", "transformerpp": "A*8"}


@dataclass(frozen=True)
class Job:
    """One training run; what distinguishes it in OUT."""

    recipe: str
    seed: int
    steps: int
    data: str  # the prefix's last part and the data's fingerprint
    overrides: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """What the configuration file is overridden with."""
        pattern = PATTERNS.get(self.recipe) or PATTERNS[RECIPES[self.recipe].attention]
        gate = [f"model.gate.{name}={yaml_text(value)}" for name, value in gate_options(self.recipe).items()]
        return [
            f"model.pattern={pattern}", *gate, f"train.seed={self.seed}", f"data.seed={self.seed}",
            f"train.steps={self.steps}", *self.overrides,
        ]  # fmt: skip

    def key(self) -> dict:
        return {**asdict(self), "overrides": list(self.overrides)}


def run(job: Job, prefix: Path, work: Path, gpu: str | None) -> dict:
    """Trains and scores one model."""
    name = "_".join([job.recipe, str(job.seed), str(job.steps), *job.overrides]).replace("/", "_")[:200]
    directory = work / name
    shutil.rmtree(directory, ignore_errors=True)  # of an earlier call
    directory.mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    config = str(Path(__file__).with_suffix(".yaml"))
    programs = [
        [
            "launch/pretrain.py",
            "--config",
            config,
            f"data.train={prefix}",
            f"checkpoint.dir={directory}",
            *job.options(),
        ],
        ["-m", "launch.experiments.real_text_score", str(directory), "--out", str(directory / "score.json")],
    ]
    began = time.perf_counter()
    seconds: list[float] = []
    for program in programs:
        with (directory / "said.txt").open("a") as said:
            status = subprocess.run(
                [sys.executable, *program], cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
            ).returncode
        seconds.append(round(time.perf_counter() - began - sum(seconds), 1))
        if status:
            last = (directory / "said.txt").read_text().strip().splitlines()[-3:]
            raise RuntimeError(f"{program[0]} {program[1]}: status {status}: {' / '.join(last)[:600]}")
    score = json.loads((directory / "score.json").read_text())
    result = {**from_log(directory / "log.jsonl"), **score, "seconds": seconds}
    for path in directory.glob("step_*"):
        shutil.rmtree(path)  # the weights are not what this is about
    return result


def from_log(log: Path) -> dict:
    """What a run's log says: losses, speed, what the gates did on the way and at the end."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [r for r in records if r["event"] == "step"]
    valid = [r for r in records if r["event"] == "valid"]
    gates = sum(name.endswith("/selected") for name in steps[-1])
    last = steps[-50:]

    def mean(name: str, rows: list[dict]) -> list[float]:
        return [round(statistics.fmean(r[f"gate{i}/{name}"] for r in rows), 4) for i in range(gates)]

    every = max(1, len(steps) // 12)
    names = [f"gate{i}/{name}" for i in range(gates) for name in ("selected", "selected_eval")]
    trace = [[r["step"], round(r["ce"], 3), *(round(r[name], 3) for name in names)] for r in steps[::every]]
    return {
        "valid": [{"step": r["step"], "ce": round(r["ce"], 5)} for r in valid],
        "train_ce": round(statistics.fmean(r["ce"] for r in last), 4),
        "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in steps)),
        "tokens": sum(r["tokens"] for r in steps),
        "epochs": max((v for k, v in steps[-1].items() if k.startswith("epochs/")), default=None),
        "skipped": sum(r["skipped"] for r in steps),
        "selected_train": mean("selected", last),
        "alpha": mean("alpha", last),
        "entropy": mean("entropy", last),
        "selected_valid": mean("selected", valid[-1:]),
        "trace": trace,
    }  # fmt: skip


def work_through(jobs: list[Job], options: argparse.Namespace, gpus: list[str | None]) -> None:
    """A thread for each GPU takes one job after the other; none is begun that would not end in time."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    lock, began = threading.Lock(), time.perf_counter()
    longest = options.expect  # seconds

    def take(gpu: str | None) -> None:
        nonlocal longest
        while True:
            if options.minutes and time.perf_counter() - began + longest > 60 * options.minutes:
                return
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.perf_counter()
            record: dict = {"run": job.key(), "on": options.about}
            try:
                record["result"] = run(job, options.data.resolve(), options.work.resolve(), gpu)
            except RuntimeError as error:  # the others do not depend on it
                record["error"] = str(error)
            with lock:
                longest = max(longest, time.perf_counter() - start)
                append(options.out, record)
                print(json.dumps(record), flush=True)

    threads = [threading.Thread(target=take, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def table(records: list[dict]) -> str:
    """What was found, as Markdown: a line a recipe and setting, mean and half the spread over the seeds."""
    rows: dict[tuple, list[dict]] = {}
    for record in records:
        if "result" in record:
            run = record["run"]
            setting = run["recipe"], run["steps"], run["data"], tuple(run["overrides"])
            rows.setdefault(setting, []).append(record["result"])
    classes = list(dict.fromkeys(name for runs in rows.values() for r in runs for name in r["by_distance"]))
    heads = ["recipe", "parameters", "tokens", "seeds", *classes, "selected: training", "evaluation", "tokens/s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (recipe, _, _, overrides), runs in rows.items():
        losses = [mean([r["by_distance"][name][0] for r in runs]) for name in classes]
        shares = [
            ", ".join(f"{statistics.fmean(layer):.3f}" for layer in zip(*(r[key] for r in runs), strict=True)) or "–"
            for key in ("selected_train", "selected_valid")
        ]
        speed = f"{statistics.median(r['tokens_per_s'] for r in runs):,.0f}"
        about = [f"{runs[0]['params'] / 1e6:.1f}M", f"{runs[0]['tokens'] / 1e6:.0f}M", str(len(runs))]
        lines.append("| " + " | ".join([" ".join([recipe, *overrides]), *about, *losses, *shares, speed]) + " |")
    return "\n".join(lines) + "\n"


def mean(values: list[float]) -> str:
    """The mean, and half of the spread where there are several."""
    spread = f" ±{(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/real_text/data/text"), help="prefix of the tokens")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1145, help="optimizer steps of 131,072 tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/real_text/results.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("runs/real_text/work"), help="folder of the runs")
    parser.add_argument("--minutes", type=float, help="begin no run that would not end by then")
    parser.add_argument("--expect", type=float, default=0.0, help="seconds that a run will take, before one has ended")
    parser.add_argument("--gpus", type=int, help="how many GPUs take runs; default: all")
    parser.add_argument("--table", action="store_true", help="print the results and run nothing")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="options of every run")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(list(read(options.out).values())))
        return 0
    if not options.data.with_suffix(".idx").exists():
        raise UserError(f"--data={options.data}: no such .bin/.idx pair; docs/evidence.md says how to make it")
    options.about = hardware()
    data = f"{options.data.name} {IndexedReader(options.data).fingerprint[:8]}"
    finished = {key for key, record in read(options.out).items() if "result" in record}
    jobs = [
        Job(recipe, seed, options.steps, data, tuple(options.overrides))
        for seed in options.seeds
        for recipe in options.recipes
    ]
    work_through([job for job in jobs if key_of(job.key()) not in finished], options, gpu_names(options.gpus))
    print(table(list(read(options.out).values())))
    return 0


def gpu_names(wanted: int | None) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES can name; [None] without a GPU: one run at a time."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return list(names[:wanted]) or [None]


if __name__ == "__main__":
    sys.exit(main())
