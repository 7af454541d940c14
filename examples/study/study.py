"""Five families of networks, trained alike on one corpus, and every evaluation task on all of them, as one HTML page.

    python examples/study/study.py              minutes of training for each family
    python examples/study/study.py --short      a quarter of that
    python examples/study/study.py --tiny       shows that every command runs, nothing else

Runs from the root of a checkout, on CPUs. Every command is printed; what one prints is in a file beside its results. A
step that was done with the same command is not done again: stop with Ctrl-C, and the same line goes on.
"""

import argparse
import gzip
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

SAMPLE = Path("data_prep/sample")
CORPUS = SAMPLE / "state_of_the_union.jsonl.gz"
QUESTIONS = SAMPLE / "state_of_the_union_qa.json"
PATTERNS = {  # about as many parameters each
    "taipan": "M*6 S", "mamba2": "M*8", "samba": "M*6 W", "jamba": "M*6 A", "transformerpp": "A*4",
}  # fmt: skip


class Size(NamedTuple):
    """How much is trained and asked."""

    folder: Path
    vocabulary: int  # of the tokenizer
    training: list[str]  # what differs from study.yaml
    perplexity: list[str]
    recall_tokens: list[str]
    latency: list[str]
    retrieval: list[str]
    qa: list[str]
    selection: list[str]


FULL = Size(
    Path("runs/study"), 2048, [],
    perplexity=["--lengths", "256,512,...,4K"],
    recall_tokens=["--edges", "64", "128", "256", "--samples", "64"],
    latency=["--contexts", "256,1K,4K,16K"],
    retrieval=["--lengths", "256,512,1K", "--depths", "3", "--samples", "5"],
    qa=["--max-new-tokens", "16"],
    selection=["--max-tokens", "4000"],
)  # fmt: skip
SHORT = FULL._replace(
    folder=Path("runs/study_short"),
    training=["train.steps=50"],
    perplexity=["--lengths", "256,512,1K", "--tokens", "16K"],
    recall_tokens=["--edges", "64", "128", "256", "--samples", "16"],
    latency=["--contexts", "256,1K,4K", "--steps", "16"],
    retrieval=["--lengths", "256,512", "--depths", "2", "--samples", "2"],
    selection=["--max-tokens", "1000"],
)
TINY = Size(
    Path("runs/study_tiny"), 512,
    [
        "model.vocab_size=512", "model.d_model=16", "model.d_ff=32", "model.mamba.d_state=8", "model.mamba.headdim=8",
        "model.attention.n_heads=2", "model.attention.window=32", "data.seq_len=64", "train.steps=4",
        "train.eval_every=2", "train.eval_samples=4", "train.micro_batch=4", "train.global_batch=4",
        "optim.warmup_steps=1",
    ],
    perplexity=["--lengths", "64,128", "--tokens", "256"],
    recall_tokens=["--edges", "16", "32", "--samples", "4"],
    latency=["--contexts", "64", "--steps", "2", "--warm", "0"],
    retrieval=["--kinds", "passkey,recall", "--lengths", "512", "--depths", "1", "--samples", "1", "--pairs", "2"],
    qa=["--samples", "2", "--max-new-tokens", "2"],
    selection=["--max-tokens", "200"],
)  # fmt: skip


class Step(NamedTuple):
    """One command."""

    name: str
    command: list[str]


Run = Callable[[list[str], Path], int]  # a command and the file for what it prints; gives its exit status


def stages(size: Size, zero_shot_data: Path | None) -> list[list[Step]]:
    """All commands. Those of one stage need nothing of each other."""
    data, results = size.folder / "data", size.folder / "results"
    runs = {family: size.folder / family for family in PATTERNS}
    tokenizer, tokens, text = data / "tokenizer.model", data / "sotu", data / "address.txt"
    models, out = [*map(str, runs.values())], ["--out", str(results)]

    def task(name: str, *arguments: str) -> Step:
        return Step(name, ["python", "-m", "megatron_taipan.evaluation", name, *arguments])

    def pretrain(family: str) -> Step:
        places = [f"data.train={tokens}", f"data.tokenizer={tokenizer}", f"checkpoint.dir={runs[family]}"]
        pattern = f"model.pattern={PATTERNS[family]}"
        start = ["python", "launch/pretrain.py", "--config", "examples/study/study.yaml"]
        return Step(family, [*start, pattern, *size.training, *places])

    def data_prep(name: str, *arguments: str) -> Step:
        return Step(name, ["python", "-m", "data_prep", name, "--input", str(CORPUS), *arguments])

    selection = [f"--json={results / 'selection.json'}", f"--out={results / 'selection.html'}", *size.selection]
    tasks = [
        task("perplexity", *models, *size.perplexity, *out),
        task("recall_tokens", *models, *size.recall_tokens, *out),
        task("retrieval", *models, *size.retrieval, *out),
        task("qa", *models, "--data", str(QUESTIONS), *size.qa, *out),
        task("selection", str(runs["taipan"]), "--text", str(text), *selection),
        task("curves", *models, *out),
    ]
    if zero_shot_data is not None:
        tasks.append(task("zero-shot", *models, "--data", str(zero_shot_data), *out))
    title = "Five families of networks on the State of the Union addresses"
    return [
        [data_prep("train-tokenizer", "--vocab-size", str(size.vocabulary), "--output", str(tokenizer))],
        [data_prep("tokenize", "--tokenizer", str(tokenizer), "--append-eod", "--output", str(tokens))],
        [pretrain(family) for family in PATTERNS],
        [task("calibrate", str(runs["taipan"]))],
        [task("latency", *models, *size.latency, *out)],  # alone, since it takes times
        tasks,
        [task("report", *models, *out, "--title", title)],
    ]


class StepFailed(Exception):
    """A command ended with another status than 0."""

    def __init__(self, step: Step, status: int, log: Path) -> None:
        super().__init__(f"{step.name} ended with status {status}; all that it printed is in {log}")
        self.status = status


def study(size: Size, run: Run, jobs: int, zero_shot_data: Path | None = None) -> None:
    """Does what is not done yet, and makes the page.

    Raises:
        StepFailed: a command failed; those that ran beside it have ended, and no other was started.
    """
    for place in ("data", "logs", "done", "results"):
        (size.folder / place).mkdir(parents=True, exist_ok=True)
    write_address(size.folder / "data/address.txt")
    for stage in stages(size, zero_shot_data):
        pool = ThreadPoolExecutor(jobs)
        try:
            for future in as_completed([pool.submit(do, step, size.folder, run) for step in stage]):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def do(step: Step, folder: Path, run: Run) -> None:
    """Runs a step, unless it was done before with the same command."""
    line, done, log = shlex.join(step.command), folder / "done" / step.name, folder / "logs" / f"{step.name}.txt"
    if step.name != "report" and done.exists() and done.read_text(encoding="utf-8") == line:
        print(f"{step.name}: done before", flush=True)
        return
    print(f"$ {line}", flush=True)
    began = time.monotonic()
    if status := run(step.command, log):
        raise StepFailed(step, status, log)
    done.write_text(line, encoding="utf-8")
    print(f"{step.name}: {time.monotonic() - began:.0f} s", flush=True)


def run_process(command: list[str], log: Path) -> int:
    """Runs a command by this interpreter, on CPUs, one thread each."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env = os.environ | hidden | {"TOKENIZERS_PARALLELISM": "false"}
    with log.open("w", encoding="utf-8") as printed:
        line = [sys.executable, *command[1:]]
        return subprocess.run(line, env=env, stdout=printed, stderr=subprocess.STDOUT).returncode


def write_address(file: Path) -> None:
    """The corpus' last address as a text of its own, for the task that shows which tokens are selected."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as lines:
        *_, last = lines
    file.write_text(json.loads(last)["text"], encoding="utf-8")


def main() -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    for name, size in (("short", SHORT), ("tiny", TINY)):
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=size, help=f"into {size.folder}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="commands at a time; default: the cores")
    parser.add_argument("--zero-shot-data", type=Path, metavar="FOLDER", help="runs zero-shot too; needs lm_eval")
    options = parser.parse_args()
    size, began = options.size or FULL, time.monotonic()
    try:
        study(size, run_process, options.jobs, options.zero_shot_data)
    except StepFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"{size.folder}/results/report.html is the page ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
