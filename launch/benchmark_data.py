"""Measures data preparation and reading, side by side with what is importable here.

    python launch/benchmark_data.py                       # corpus of 100 MB, all tokenizers that are given
    python launch/benchmark_data.py --megabytes 600 --tokenizer gpt2/tokenizer.json --rounds 5

Every contender is a whole process, start-up included. Contenders take turns, round after round, so that a busy machine
slows all of them alike; the table gives the median and the ratio of medians. What is compared:

    ours        python -m data_prep tokenize
    megatron    the way of Megatron-LM's tools/preprocess_data.py (which its package does not carry), written here with
                megatron.core's IndexedDatasetBuilder and the same tokenizer library: worker processes send the ids of
                each document to the parent, which adds them one by one
    library     the tokenizer library that `ours` chose, alone: documents already in memory, encoded in worker processes
                and thrown away. Not a tool but the limit of one.

The corpus is made once from documentation packages of Debian: HTML turned into text, doubles dropped, documents in
their real lengths.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "python3.11-doc postgresql-doc-15 erlang-doc linux-doc-6.1 llvm-14-doc rust-doc openjdk-17-doc git-doc"
    " libboost1.81-doc debian-handbook gnome-user-docs"
).split()


def main(argv: list[str] | None = None) -> int:
    """Command line of its own; `launch/benchmark.py data` calls `run`."""
    sys.path.insert(0, str(ROOT))
    from megatron_taipan.errors import exits_cleanly

    return exits_cleanly(run)(argv)


def run(argv: list[str] | None = None) -> None:
    """Runs the benchmarks that the arguments name and prints their tables in Markdown."""
    from megatron_taipan.errors import UserError

    parser = argparse.ArgumentParser(prog="benchmark data", description=__doc__, formatter_class=_Raw)
    parser.add_argument("--cache", default=str(Path.home() / ".cache/megatron_taipan/benchmark"), help="corpus folder")
    parser.add_argument("--corpus", help="a .jsonl file of your own in place of the built one")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the corpus (default: 100)")
    parser.add_argument(
        "--tokenizer", nargs="*", default=[], help="tokenizer files; none: a sentencepiece of 32k is trained"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument(
        "--skip", nargs="*", default=[], help="contenders or parts left out: megatron library reading opening"
    )
    parser.add_argument("--open-documents", type=int, default=50_000_000, help="documents of the corpus that is opened")
    parser.add_argument("--as-peer", help=argparse.SUPPRESS)  # this script is also the process of a contender
    args = parser.parse_args(argv)
    if args.as_peer:
        _peer(args.as_peer, args.corpus, args.tokenizer[0], args.workers)
        return
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: at least 1 is needed")
    corpus = args.corpus or build_corpus(Path(args.cache), args.megabytes)
    tokenizers = args.tokenizer or [_train(corpus, args.cache)]
    print(f"{corpus}: {os.path.getsize(corpus) / 1e6:.0f} MB; {args.workers} workers, {args.rounds} rounds, medians\n")
    prefix = None
    for tokenizer in tokenizers:
        prefix = compare(corpus, tokenizer, args)
    if "reading" not in args.skip and prefix:
        reading(prefix)
    if "opening" not in args.skip:
        opening(args.open_documents)


# ---------------------------------------------------------------- tokenizing


def compare(corpus: str, tokenizer: str, args: argparse.Namespace) -> str:
    """One table: seconds, speed and memory of each contender for one tokenizer. Returns the prefix that ours wrote."""
    keep = tempfile.mkdtemp(prefix="benchmark_data_")
    ours = [sys.executable, "-m", "data_prep", "tokenize", "--input", corpus, "--tokenizer", tokenizer, "--append-eod"]
    peer = [sys.executable, __file__, "--corpus", corpus, "--tokenizer", tokenizer, "--workers", str(args.workers)]
    contenders: dict[str, list[str]] = {
        "ours": [*ours, "--output", f"{keep}/ours", "--overwrite", "--workers", str(args.workers)],
        "ours, 1 worker": [*ours, "--output", f"{keep}/one", "--overwrite", "--workers", "1"],
    }
    for name in ("library", "megatron"):
        if name not in args.skip:
            contenders[name] = [*peer, "--as-peer", f"{name}:{keep}/{name}"]
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    said = ""
    for _ in range(args.rounds):
        for name, command in contenders.items():
            for ending in (".bin", ".idx", ".json"):  # or it would be complete already
                Path(command[command.index("--output") + 1] + ending if "--output" in command else "-").unlink(
                    missing_ok=True
                )
            seconds, memory, output = measure(command)
            results[name].append((seconds, memory))
            said = output if name == "ours" else said
    size = os.path.getsize(corpus) / 1e6
    print(f"tokenizer {tokenizer}\n{said.strip()}\n")
    print("| contender | seconds (min to max) | MB/s | peak memory of all processes, MB | ours is faster by |")
    print("|---|---|---|---|---|")
    base = statistics.median(seconds for seconds, _ in results["ours"])
    for name, runs in results.items():
        times = [run[0] for run in runs]
        middle = statistics.median(times)
        print(
            f"| {name} | {middle:.2f} ({min(times):.2f} to {max(times):.2f}) | {size / middle:.1f} |"
            f" {max(run[1] for run in runs):.0f} | {middle / base:.2f} |"
        )
    if "megatron" in contenders:
        same = all(
            Path(f"{keep}/ours{ending}").read_bytes() == Path(f"{keep}/megatron{ending}").read_bytes()
            for ending in (".bin", ".idx")
        )
        print(f"\nthe same bytes as megatron: {'yes' if same else 'NO'}")
    print()
    return f"{keep}/ours"


def measure(command: list[str]) -> tuple[float, float, str]:
    """Runs a command: seconds, peak of the summed proportional memory of it and its children in MB, its output."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = [0.0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], sum(_pss(pid) for pid in _tree(process.pid)))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
    return seconds, peak[0], output


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid] + [below for child in children for below in _tree(int(child))]


def _pss(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1e3
    except (OSError, ValueError):
        pass
    return 0.0


# ---------------------------------------------------------------- the other contenders, each in a process of its own


def _peer(spec: str, corpus: str, tokenizer: str, workers: int) -> None:
    sys.path.insert(0, str(ROOT))
    name, _, output = spec.partition(":")
    {"megatron": _megatron, "library": _library}[name](corpus, tokenizer, workers, output)


class _Encoder:
    """What Megatron's tool runs in its workers: one JSON line in, the ids of the document out."""

    def __init__(self, tokenizer: str):
        self.name = tokenizer

    def start(self) -> None:
        from data_prep.tokenizers import load_tokenizer

        _Encoder.tokenizer = load_tokenizer(self.name)  # type: ignore[attr-defined]

    def encode(self, line: str) -> tuple[list[int], int]:
        tokenizer = _Encoder.tokenizer  # type: ignore[attr-defined]
        ids = tokenizer.encode([json.loads(line)["text"]])[0].tolist()
        return [*ids, tokenizer.eod], len(line)


def _megatron(corpus: str, tokenizer: str, workers: int, output: str) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from data_prep.tokenizers import load_tokenizer

    encoder = _Encoder(tokenizer)
    dtype = DType.optimal_dtype(load_tokenizer(tokenizer).vocab_size)
    builder = IndexedDatasetBuilder(output + ".bin", dtype=dtype)
    with open(corpus, encoding="utf-8") as file, multiprocessing.Pool(workers, initializer=encoder.start) as pool:
        for ids, _ in pool.imap(encoder.encode, file, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(output + ".idx")


def _library(corpus: str, tokenizer: str, workers: int, output: str) -> None:
    from data_prep.fast import fast_twin
    from data_prep.tokenizers import load_tokenizer, tokenizer_file

    del output
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encoder = load_tokenizer(tokenizer)
    if not tokenizer.startswith("tiktoken:"):
        try:
            encoder = fast_twin(encoder, tokenizer_file(tokenizer))
        except ValueError:
            pass
    context = multiprocessing.get_context("fork")
    started = time.perf_counter()
    share = -(-len(texts) // workers)
    processes = [
        context.Process(target=_encode_all, args=(encoder, texts[share * i : share * (i + 1)])) for i in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(f"encoding alone: {time.perf_counter() - started:.2f} s")


def _encode_all(encoder, texts: list[str]) -> None:
    for at in range(0, len(texts), 64):
        encoder.encode(texts[at : at + 64])


# ---------------------------------------------------------------- reading


def reading(prefix: str) -> None:
    """Samples a second of one process, from page cache."""
    import numpy as np
    import torch

    from megatron_taipan.config import DataConfig, DataSource
    from megatron_taipan.data.indexed import IndexedReader
    from megatron_taipan.data.loader import build_dataset

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
        "ours: the same as a batch of 8 with labels, loss mask and seq_idx": (
            lambda i: data.batch(list(range(8 * i, 8 * i + 8))),
            8,
        ),
    }
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        theirs = IndexedDataset(prefix)
        documents = np.random.default_rng(0).integers(0, len(theirs), 20_000).tolist()
        rows["megatron.core IndexedDataset, one document each"] = (lambda i: theirs[documents[i]], 1)
    except ImportError:
        pass
    print("| reading, one process | samples of 4,096 tokens a second, median of 5 |\n|---|---|")
    for name, (read, size) in rows.items():
        count = 20_000 // size
        rates = []
        for _ in range(5):
            started = time.perf_counter()
            for i in range(count):
                read(i)
            rates.append(count * size / (time.perf_counter() - started))
        print(f"| {name} | {statistics.median(rates):,.0f} |")
    print()


def opening(documents: int) -> None:
    """Seconds and memory to open a corpus and to know any sample of any epoch, in a fresh process."""
    import numpy as np

    from megatron_taipan.data.indexed import commit, write_index

    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as folder:
        prefix = f"{folder}/big"
        lengths = np.minimum(np.random.default_rng(0).lognormal(6.4, 1, documents), 20_000).astype("<i4") + 1
        lengths.tofile(prefix + ".len.partial")
        with open(prefix + ".bin.partial", "wb") as file:
            file.truncate(2 * int(lengths.sum(dtype=np.int64)))  # a hole: opening looks at the index
        write_index(prefix + ".idx.partial", np.dtype(np.uint16), prefix + ".len.partial")
        commit(prefix)
        code = f"""
import resource, time
from megatron_taipan.config import DataConfig
from megatron_taipan.data.loader import build_dataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
data = build_dataset(DataConfig(train={prefix!r}, seq_len=4096, valid_fraction=0.02), "train", 65536)
data.tokens(0), data.tokens(1000 * len(data) + 5)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{{time.perf_counter() - start:.2f}} s, {{after / 1e3:.0f}} MB ({{before / 1e3:.0f}} of them imports)")
"""
        tokens = int(lengths.sum(dtype=np.int64)) / 1e9
        print(f"opening {documents:,} documents, {tokens:.1f} B tokens, 2 % held out, reading in epochs 0 and 1000:")
        for _ in range(3):
            print(
                "  "
                + subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip()
            )


# ---------------------------------------------------------------- the corpus


def build_corpus(cache: Path, megabytes: int) -> str:
    """A .jsonl of about this size, made once; beyond what the packages hold, documents return, numbered."""
    from megatron_taipan.errors import UserError

    target = cache / f"corpus_{megabytes}.jsonl"
    if target.exists():
        return str(target)
    packages = cache / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        if not (packages / name).exists():
            try:
                subprocess.run(["apt-get", "download", "-qq", name], cwd=packages, check=True, capture_output=True)
                archive = next(packages.glob(f"{name}_*.deb"))
                subprocess.run(["dpkg", "-x", archive, packages / name], check=True, capture_output=True)
                archive.unlink()
            except (OSError, subprocess.CalledProcessError, StopIteration) as error:
                print(f"package {name} is not to be had ({error}); going on without it", file=sys.stderr)
    seen: set[bytes] = set()
    written, turn = 0, 0
    with open(f"{target}.partial", "w", encoding="utf-8") as out:
        while written < megabytes * 1_000_000:
            before = written
            for text in _documents(packages):
                digest = blake2b(text.encode(), digest_size=16).digest()
                if turn == 0 and digest in seen:
                    continue
                seen.add(digest)
                line = json.dumps({"text": f"Copy {turn}. {text}" if turn else text}, ensure_ascii=False) + "\n"
                written += out.write(line)
                if written >= megabytes * 1_000_000:
                    break
            if written == before:
                raise UserError("no documentation package could be fetched; give a .jsonl file with --corpus")
            turn += 1
    os.replace(f"{target}.partial", target)
    return str(target)


def _documents(folder: Path):
    """Text of every HTML page and text file, in a fixed order that mixes the packages."""
    from lxml import html

    for path in sorted(
        folder.rglob("*.*"),
        key=lambda path: blake2b(path.name.encode() + bytes(str(path.parent)[-9:], "utf-8")).digest(),
    ):
        if path.suffix in (".html", ".htm", ".txt") and path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            try:
                if path.suffix == ".txt":
                    text = data.decode()
                else:
                    text = html.fromstring(data).text_content()
            except (ValueError, html.etree.ParserError, AssertionError):
                continue
            text = "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
            if len(text) > 200:
                yield text.encode("utf-8", "ignore").decode()


def _train(corpus: str, cache: str) -> str:
    path = f"{cache}/sentencepiece_32000.model"
    if not os.path.exists(path):
        command = [sys.executable, "-m", "data_prep", "train-tokenizer", "--input", corpus, "--output", path]
        subprocess.run([*command, "--vocab-size", "32000", "--max-bytes", "50000000"], cwd=ROOT, check=True)
    return path


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description."""


if __name__ == "__main__":
    sys.exit(main())
