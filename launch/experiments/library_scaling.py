"""Does the fast tokenizer library itself gain from a second process? The ceiling of `data_prep tokenize --workers 2`.

    python -m launch.experiments.library_scaling --corpus CORPUS.jsonl --tokenizer tokenizer.json

Documents are in memory before the clock starts; one process on all of them, then two on every other one, each process
bound to a core of its own. Prints seconds until the last process is done.
"""

import argparse
import json
import os
import time
from multiprocessing import Barrier, Process, Queue
from typing import Any

BATCH = 64  # documents a call


def encode(arguments: argparse.Namespace, rank: int, processes: int, start: Any, results: Any) -> None:
    """One process: its share of the documents, encoded; puts its seconds into `results`."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    os.environ["RAYON_NUM_THREADS"] = "1"
    import fastokens

    with open(arguments.corpus) as file:
        texts = [json.loads(line)["text"] for k, line in enumerate(file) if k % processes == rank]
    model = fastokens.Tokenizer.from_file(arguments.tokenizer)
    start.wait()
    began = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        model.encode_batch_flat(texts[first : first + BATCH], add_special_tokens=False, split_special_tokens=True)
    results.put(time.perf_counter() - began)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for _ in range(arguments.rounds):
        for processes in (1, 2):
            start = Barrier(processes)
            results: Any = Queue()
            workers = [Process(target=encode, args=(arguments, k, processes, start, results)) for k in range(processes)]
            for worker in workers:
                worker.start()
            seconds = [results.get() for _ in workers]
            for worker in workers:
                worker.join()
            print(f"{processes} processes: {max(seconds):.2f} s", flush=True)


if __name__ == "__main__":
    main()
