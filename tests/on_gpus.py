"""Every test marked `gpu`, over this machine's GPUs: each file in a process of its own, several at a time.

    python -m tests.on_gpus                          all of them, three files at a time on a GPU
    python -m tests.on_gpus tests/ops --at-once 1    those of a folder
    python -m tests.on_gpus --minutes 9              starts none that would end later; the same command goes on

A file that passed is a line of OUT/tests.jsonl, and is not run again there: give another --out for another tree. What
pytest printed is in OUT, a file each. Tests that need more GPUs than there are skip themselves, as pytest counts.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.in_parts import make_runs, read_runs
from experiments.real_text import gpu_names

ROOT = Path(__file__).resolve().parents[1]
# Files with tests of several GPUs, and the most that one of them uses.
SEVERAL = {
    "tests/distributed/test_dead_rank_gpu.py": 2, "tests/distributed/test_layouts_gpu.py": 2,
    "tests/hf/test_device_map.py": 2, "tests/hf/test_devices.py": 2, "tests/model/test_piece_mixer_gpu.py": 2,
    "tests/parallel/test_overlapped_comm.py": 4,
}  # fmt: skip
ON_GPU = re.compile(r"mark\.gpu\b|from tests\.ops\.devices import .*DEVICES")
COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def gpu_files(places: list[Path]) -> list[str]:
    """The test files below these places that have tests marked gpu, from the repository's root."""
    files = sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("test_*.py")))
    return [path.resolve().relative_to(ROOT).as_posix() for path in files if ON_GPU.search(path.read_text("utf-8"))]


def gpu_groups(gpus: list[str], size: int, at_once: int) -> list[str]:
    """Where files of so many GPUs run at the same time, as CUDA_VISIBLE_DEVICES; fewer where there are no more."""
    size = min(size, len(gpus))
    groups = [",".join(gpus[first : first + size]) for first in range(0, len(gpus) - size + 1, size)]
    return groups * at_once


def lanes(files: list[str], at_once: int) -> list[tuple[list[int], int]]:
    """What runs side by side: sizes, each after the one before it, and how many of their files at a time on a GPU.

    Files of several GPUs, which take the longest, run beside those of one, one at a time on a GPU.
    """
    sizes = sorted({SEVERAL.get(file, 1) for file in files}, reverse=True)
    if at_once == 1 or 1 not in sizes or sizes == [1]:
        return [(sizes, at_once)]
    return [(sizes[:-1], 1), ([1], at_once - 1)]


def run_file(what: dict, gpus: str, *, out: Path, timeout: float) -> dict:
    """Runs a file's gpu tests on these GPUs; the counts of pytest's last line, and seconds.

    Raises:
        RuntimeError: a test failed, none ran, or they took longer than `timeout` seconds.
    """
    log = out / (what["file"].replace("/", ".") + ".log")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="taipan-gpu-") as folder, log.open("w+") as file:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", what["file"]]
        job = subprocess.Popen(
            [*command, "--basetemp", f"{folder}/tests"], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus},
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = job.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            raise RuntimeError(f"not done within {timeout:g} s; see {log}") from None
        file.seek(0)
        said = file.read().splitlines()
    last = next((line for line in reversed(said) if COUNTS.search(line)), "")
    failed = [line.split(" - ")[0] for line in said if line.startswith(("FAILED ", "ERROR "))]
    if status:
        raise RuntimeError(f"status {status}, {last.strip('= ')}; {'; '.join(failed)}; see {log}")
    counts = {kind: int(number) for number, kind in COUNTS.findall(last)}
    return {**counts, "seconds": round(time.monotonic() - began)}


def main(arguments: list[str] | None = None) -> int:
    """The program; 1 where a file failed or was not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", type=Path, default=[ROOT / "tests"], help="files or folders")
    parser.add_argument("--at-once", type=int, default=3, help="files at a time on a GPU")
    parser.add_argument("--minutes", type=float, help="start no file that would end later")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a file may take")
    parser.add_argument("--out", type=Path, default=Path("runs/tests_on_gpus"), help="folder of the results")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results, gpus = options.out / "tests.jsonl", [name for name in gpu_names() if name is not None]
    if not gpus:
        print("torch sees no GPU here", file=sys.stderr)
        return 2
    files = gpu_files(options.places)
    run, began = partial(run_file, out=options.out, timeout=options.timeout), time.monotonic()

    def run_lane(lane: tuple[list[int], int]) -> int:
        sizes, at_once = lane
        left = 0
        for size in sizes:
            minutes = options.minutes and options.minutes - (time.monotonic() - began) / 60
            wanted = [{"file": file} for file in files if SEVERAL.get(file, 1) == size]
            left += make_runs(results, wanted, run, minutes, devices=gpu_groups(gpus, size, at_once))
        return left

    with ThreadPoolExecutor() as pool:
        left = sum(pool.map(run_lane, lanes(files, options.at_once)))
    found = [record["result"] for record in read_runs(results).values() if "result" in record]
    total = {kind: sum(result.get(kind, 0) for result in found) for kind in ("passed", "skipped")}
    print(f"{total['passed']} passed, {total['skipped']} skipped in {len(found)} files; {left} failed or are left")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
