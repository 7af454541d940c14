"""What does a second process gain for `data_prep tokenize`, and for the fast tokenizer library alone, its upper limit?

    python -m experiments.worker_scaling --corpus CORPUS.jsonl --tokenizer tokenizer.json --rounds 5

Each round runs one process bound to a core and then two, of the library alone and of `data_prep`, so that other work on
the machine affects all of them. Prints all seconds, and medians with the efficiency, time of one / (2 x time of two).
The library's documents are in memory before its clock starts.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from multiprocessing import Barrier, Process, Queue
from statistics import median
from typing import Any

BATCH = 64  # documents a call of the library


def encode(arguments: argparse.Namespace, rank: int, processes: int, start: Any, results: Any) -> None:
    """One process: its share of the documents, encoded; puts its seconds into `results`."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    import fastokens

    with open(arguments.corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for k, line in enumerate(file) if k % processes == rank]
    model = fastokens.Tokenizer.from_file(arguments.tokenizer)
    start.wait()
    began = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        model.encode_batch_flat(texts[first : first + BATCH], add_special_tokens=False, split_special_tokens=True)
    results.put(time.perf_counter() - began)


def time_library(arguments: argparse.Namespace, processes: int) -> dict[str, float]:
    """Seconds until the last of the processes is done."""
    start = Barrier(processes)
    results: Any = Queue()
    workers = [Process(target=encode, args=(arguments, k, processes, start, results)) for k in range(processes)]
    for worker in workers:
        worker.start()
    seconds = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return {"library alone": max(seconds)}


def time_data_prep(arguments: argparse.Namespace, workers: int) -> dict[str, float]:
    """Seconds of a whole `data_prep tokenize`, and of its tokenizing; one worker is bound to one core."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        command = [sys.executable, "-m", "data_prep", "tokenize", "--input", arguments.corpus]
        command += ["--tokenizer", arguments.tokenizer, "--append-eod", "--output", f"{folder}/o"]
        command += ["--workers", str(workers), "--backend", arguments.backend]
        began = time.perf_counter()
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)
        )
        whole = time.perf_counter() - began
    found = re.search(r"([\d.]+) s to tokenize", done.stdout)
    assert found, done.stdout
    return {"data_prep, tokenizing": float(found[1]), "data_prep, whole process": whole}


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--backend", default="auto", choices=("auto", "reference"), help="of data_prep")
    parser.add_argument("--dir", help="folder for the output; default: the system's temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, dict[int, list[float]]] = {}
    for _ in range(arguments.rounds):
        for measure in (time_library, time_data_prep):
            for processes in (1, 2):
                for name, seconds in measure(arguments, processes).items():
                    found.setdefault(name, {1: [], 2: []})[processes].append(seconds)
    for name, measured in found.items():
        one, two = median(measured[1]), median(measured[2])
        rounds = "; ".join(" ".join(f"{s:.2f}" for s in measured[k]) for k in (1, 2))
        print(f"{name}: one {one:.2f} s, two {two:.2f} s, efficiency {one / (2 * two):.2f}   ({rounds})", flush=True)


if __name__ == "__main__":
    main()
