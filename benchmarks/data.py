"""Measures data preparation and reading, side by side with the peers that are installed here.

    python -m benchmarks data                       # corpus of 100 MB, all tokenizers that are given
    python -m benchmarks data --megabytes 600 --tokenizer gpt2/tokenizer.json --rounds 5

Every contender is a whole process, start-up included. Contenders take turns, round after round, so that a busy machine
slows all of them alike; the table shows the median and the ratio of medians, and the processor time, which other work
on the machine affects less. The contenders besides `ours` are described in data_peers.py.

The corpus is made once from Debian's documentation packages: HTML turned into text, duplicates dropped, documents in
their real lengths. Where the packages hold less, numbered copies follow, since only the time matters here.
"""

import argparse
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("library", "gigatoken", "megatron")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--cache", default=str(Path.home() / ".cache/megatron_taipan/benchmark"), help="corpus folder")
    parser.add_argument("--corpus", help="a .jsonl file of your own in place of the built one")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the corpus (default: 100)")
    parser.add_argument(
        "--tokenizer", nargs="*", default=[], help="tokenizer files; none: a sentencepiece of 32k is trained"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument(
        "--skip",
        nargs="*",
        default=[],
        help="contenders or parts left out: megatron gigatoken library resuming reading opening",
    )
    parser.add_argument("--only", choices=("reading", "opening"), help="just this part")
    parser.add_argument("--open-documents", type=int, default=50_000_000, help="documents of the corpus that is opened")


def run(args: argparse.Namespace) -> None:
    """Runs the benchmarks that the arguments name and prints their tables in Markdown."""
    from benchmarks.corpus import build_corpus
    from megatron_taipan.errors import UserError

    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: at least 1 is needed")
    if args.only == "opening":
        opening(args.open_documents)
        return
    corpus = args.corpus or build_corpus(Path(args.cache), args.megabytes, repeat=True)
    tokenizers = args.tokenizer or [_train(corpus, args.cache)]
    print(f"{corpus}: {os.path.getsize(corpus) / 1e6:.0f} MB; {args.workers} workers, {args.rounds} rounds, medians\n")
    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as folder:
        if args.only == "reading":
            run_measured(tokenize_command(corpus, tokenizers[0], f"{folder}/ours", args.workers))
            reading(f"{folder}/ours")
            return
        for tokenizer in tokenizers:
            compare_contenders(corpus, tokenizer, args, folder)
        if "resuming" not in args.skip:
            resuming(corpus, tokenizers[0], args.workers, folder)
        if "reading" not in args.skip:
            reading(f"{folder}/ours")
    if "opening" not in args.skip:
        opening(args.open_documents)


# ---------------------------------------------------------------- tokenizing


def tokenize_command(corpus: str, tokenizer: str, output: str, workers: int) -> list[str]:
    """The command that is measured."""
    command = [sys.executable, "-m", "data_prep", "tokenize", "--input", corpus, "--tokenizer", tokenizer]
    return [*command, "--append-eod", "--output", output, "--workers", str(workers)]


def compare_contenders(corpus: str, tokenizer: str, args: argparse.Namespace, folder: str) -> None:
    """One table: seconds, speed and memory of each contender for one tokenizer; leaves what ours wrote as `ours`."""
    from benchmarks.data_peers import importable

    contenders = {
        "ours": tokenize_command(corpus, tokenizer, f"{folder}/ours", args.workers),
        "ours, 1 worker": tokenize_command(corpus, tokenizer, f"{folder}/one", 1),
    }
    if args.workers == 1:
        del contenders["ours, 1 worker"]
    for name in PEERS:
        if name not in args.skip and importable(name):
            peer = [sys.executable, str(ROOT / "benchmarks/data_peers.py"), name, corpus, tokenizer]
            contenders[name] = [*peer, str(args.workers), f"{folder}/{name}"]
    outputs = {name: f"{folder}/{name}" for name in contenders} | {"ours, 1 worker": f"{folder}/one"}
    results: dict[str, list[CommandCost]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, command in contenders.items():
            for ending in (".bin", ".idx", ".json"):  # or it would be complete already
                Path(outputs[name] + ending).unlink(missing_ok=True)
            results[name].append(run_measured(command))
    size = os.path.getsize(corpus) / 1e6
    small = f"{folder}/small.jsonl"
    Path(small).write_text('{"text": "one document"}\n', encoding="utf-8")
    commands = [tokenize_command(small, tokenizer, f"{folder}/small{i}", args.workers) for i in range(args.rounds)]
    start = [run_measured(command).seconds for command in commands]
    print(f"tokenizer {tokenizer}\n{results['ours'][-1].output.strip()}")
    print(f"ours on a single document, its start-up: {statistics.median(start):.2f} s\n")
    print(
        "| contender | seconds (min to max) | MB/s | processor seconds | peak memory of all processes, MB | ours is",
        end="",
    )
    print(" faster by | by processor time |\n|---|---|---|---|---|---|---|")
    base = [statistics.median(run.seconds for run in results["ours"])]
    base.append(statistics.median(run.processor for run in results["ours"]))
    for name, runs in results.items():
        times = [run.seconds for run in runs]
        middle, processor = statistics.median(times), statistics.median(run.processor for run in runs)
        print(
            f"| {name} | {middle:.2f} ({min(times):.2f} to {max(times):.2f}) | {size / middle:.1f} | {processor:.2f} |"
            f" {max(run.memory for run in runs):.0f} | {middle / base[0]:.2f} | {processor / base[1]:.2f} |"
        )
    if "ours, 1 worker" in results:
        print(f"\nparallel efficiency from 1 to {args.workers} workers: {_efficiency(results, args.workers)}")
    for name in ("megatron", "gigatoken"):
        if name in contenders:
            same = all(
                Path(f"{folder}/ours{ending}").read_bytes() == Path(f"{folder}/{name}{ending}").read_bytes()
                for ending in (".bin", ".idx")
            )
            print(f"\nthe same bytes as {name}: {'yes' if same else 'NO'}")
    print()


def _efficiency(results: dict[str, list["CommandCost"]], workers: int) -> str:
    """Parallel efficiency of the whole process, and of the part that tokenizes documents, from the tool's output."""
    said = []
    for part, seconds in (("the whole process", _whole), ("tokenizing alone", _tokenizing)):
        one, all = (statistics.median(map(seconds, results[name])) for name in ("ours, 1 worker", "ours"))
        said.append(f"{part} {one / all / workers:.2f} ({one:.2f} s, {all:.2f} s)")
    return "; ".join(said)


def _whole(run: "CommandCost") -> float:
    return run.seconds


def _tokenizing(run: "CommandCost") -> float:
    found = re.search(r"([0-9.]+) s to tokenize", run.output)
    if not found:
        raise RuntimeError(f"ours did not say how long it tokenized:\n{run.output}")
    return float(found[1])


def resuming(corpus: str, tokenizer: str, workers: int, folder: str) -> None:
    """The cost of a run that was killed in the middle: seconds until the kill, and of the run that continues."""
    command = tokenize_command(corpus, tokenizer, f"{folder}/resumed", workers)
    whole = run_measured(command).seconds
    for ending in (".bin", ".idx", ".json"):
        Path(f"{folder}/resumed{ending}").unlink()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.6 * whole)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rest = run_measured(command)
    said = next((line for line in rest.output.splitlines() if line.startswith("continuing")), "nothing was finished")
    print(
        f"resuming: undisturbed {whole:.2f} s; killed after {0.6 * whole:.2f} s, the same command then took"
        f" {rest.seconds:.2f} s ({said})\n"
    )


class CommandCost:
    """One run of a command: seconds, processor seconds of it and its children, peak of their summed proportional
    memory in MB, output."""

    def __init__(self, seconds: float, processor: float, memory: float, output: str):
        self.seconds, self.processor, self.memory, self.output = seconds, processor, memory, output


def run_measured(command: list[str]) -> CommandCost:
    """Runs a command and measures it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = [0.0]

    def watch() -> None:
        while process.returncode is None:
            peak[0] = max(peak[0], sum(_pss(pid) for pid in _tree(process.pid)))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return CommandCost(seconds, processor, peak[0], output)


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [pid] + [below for child in children for below in _tree(int(child))]


def _pss(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1e3
    except (OSError, ValueError):
        pass
    return 0.0


# ---------------------------------------------------------------- reading


def reading(prefix: str) -> None:
    """Samples a second of one process, from page cache."""
    import numpy as np
    import torch

    from megatron_taipan.data.indexed import IndexedReader
    from megatron_taipan.data.loader import build_dataset, make_loader
    from megatron_taipan.data_config import DataConfig, DataSource

    torch.set_num_threads(1)
    reader = IndexedReader(prefix)
    data = build_dataset(
        DataConfig(train=[DataSource(prefix=prefix)], seq_len=4096, valid_fraction=0.02), "train", 1 << 31
    )
    whole = np.memmap(prefix + ".bin", reader.dtype, "r")
    draw = np.random.default_rng(0).integers(0, len(whole) - 4097, 20_000).tolist()
    rows: dict[str, tuple[Callable[[int], object], int]] = {
        "numpy memmap, copies of 4,097 ids, nothing else": (lambda i: np.array(whole[draw[i] : draw[i] + 4097]), 1),
        "ours: order, split, ids, document boundaries, check of the ids": (data.tokens, 1),
    } | {
        f"ours: the same as a batch of {b} with labels, loss mask and seq_idx": (
            lambda i, b=b: data.batch(list(range(b * i, b * i + b))),  # type: ignore[misc]
            b,
        )
        for b in (2, 8, 64)
    }
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        theirs = IndexedDataset(prefix)
        documents = np.random.default_rng(0).integers(0, len(theirs), 20_000).tolist()
        rows["megatron.core IndexedDataset, one document each, copied"] = (lambda i: np.array(theirs[documents[i]]), 1)
    except ImportError:
        pass
    print(
        "| reading, one process | samples of 4,096 tokens a second, median of 5 | a processor second |\n|---|---|---|"
    )
    for name, (read, size) in rows.items():
        count = 20_000 // size
        rates = []
        for _ in range(5):
            started, used = time.perf_counter(), time.process_time()
            for i in range(count):
                read(i)
            rates.append((count * size / (time.perf_counter() - started), count * size / (time.process_time() - used)))
        clock, processor = (statistics.median(rate) for rate in zip(*rates, strict=True))
        print(f"| {name} | {clock:,.0f} | {processor:,.0f} |")
    for workers in (0, 1, 2):
        through = []
        for _ in range(5):
            loader = make_loader(data, start=0, global_batch=8, micro_batch=8, dp_rank=0, dp_size=1, workers=workers)
            next(loader)  # workers have started
            started = time.perf_counter()
            for _ in range(250):
                next(loader)
            through.append(2000 / (time.perf_counter() - started))
            del loader
        print(f"| ours: the loader, batches of 8, {workers} worker processes | {statistics.median(through):,.0f} | |")
    print()


def opening(documents: int) -> None:
    """Seconds and memory to open a corpus and to read samples of two epochs, in a fresh process."""
    import numpy as np

    from megatron_taipan.data.indexed import commit, write_index

    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as folder:
        prefix = f"{folder}/big"
        lengths = np.minimum(np.random.default_rng(0).lognormal(6.4, 1, documents), 20_000).astype("<i4") + 1
        lengths.tofile(prefix + ".len.partial")
        with open(prefix + ".bin.partial", "wb") as file:
            file.truncate(2 * int(lengths.sum(dtype=np.int64)))  # a sparse file: opening reads the index
        write_index(prefix + ".idx.partial", np.dtype(np.uint16), prefix + ".len.partial")
        commit(prefix)
        code = f"""
import time
from megatron_taipan.data_config import DataConfig
from megatron_taipan.data.loader import build_dataset
def peak():  # ru_maxrss would begin with what the parent had
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
start = time.perf_counter()
data = build_dataset(DataConfig(train={prefix!r}, seq_len=4096, valid_fraction=0.02), "train", 65536)
data.tokens(0), data.tokens(1000 * len(data) + 5)
after = peak()
print(f"{{time.perf_counter() - start:.2f}} s, {{after / 1e3:.0f}} MB ({{before / 1e3:.0f}} of them imports)")
"""
        tokens = int(lengths.sum(dtype=np.int64)) / 1e9
        print(f"opening {documents:,} documents, {tokens:.1f} B tokens, 2 % held out, reading in epochs 0 and 1000:")
        for _ in range(3):
            print(
                "  "
                + subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip()
            )


def _train(corpus: str, cache: str) -> str:
    path = f"{cache}/sentencepiece_32000.model"
    if not os.path.exists(path):
        command = [sys.executable, "-m", "data_prep", "train-tokenizer", "--input", corpus, "--output", path]
        subprocess.run([*command, "--vocab-size", "32000", "--max-bytes", "50000000"], cwd=ROOT, check=True)
    return path
