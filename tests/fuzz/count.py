"""Counts executions of the readers on mutated inputs; needs only the tests' own packages.

    python -m tests.fuzz.count --executions 1000000                   all targets in turn
    python -m tests.fuzz.count --executions 100000 --only packed      one

An input that makes a target raise anything but a UserError, ends the process, or takes more than 20 s or 2 GB, is a
finding: it is kept in --kept, printed with its traceback, and the exit status is 1. The inputs depend on --first alone.
Targets that are quick have more turns.
"""

import argparse
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz import targets
from tests.fuzz.seeds import MAKERS, mutated, seeds

SECONDS, MEMORY = 20, 2 << 30  # of one execution; of addresses beyond those at the start
MOST_FINDINGS = 20
TURNS = [*["index", "lines", "packed", "text", "table", "beside"] * 5, "configuration", "state", "tensors"]
CHUNK = 5000  # executions of one process: what is lost at most when a library ends it


@dataclass
class FuzzCount:
    """Executions, seconds and findings by target."""

    executions: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def add(self, other: "FuzzCount") -> None:
        for name, number in other.executions.items():
            self.executions[name] = self.executions.get(name, 0) + number
            self.seconds[name] = self.seconds.get(name, 0.0) + other.seconds[name]
        self.findings += other.findings

    def table(self) -> str:
        """In Markdown."""
        lines = ["| reader | executions | s | findings |", "|---|---:|---:|---:|"]
        for name, number in self.executions.items():
            found = sum(text.startswith(name + " ") for text in self.findings)
            lines.append(f"| `{name}` | {number:,} | {self.seconds[name]:.0f} | {found} |")
        total = sum(self.executions.values())
        return "\n".join([*lines, f"| all | {total:,} | {sum(self.seconds.values()):.0f} | {len(self.findings)} |"])


def count_findings(
    names: list[str], executions: int, *, first: int, kept: Path, say: Any = lambda text: None, at: Any = None
) -> FuzzCount:
    """Runs targets in turn on the inputs of the numbers from `first` on; `at[:8]` holds the current number."""
    result = FuzzCount(dict.fromkeys(names, 0), dict.fromkeys(names, 0.0))
    folder = Path(tempfile.mkdtemp(prefix="fuzz_", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        for number in range(first, first + executions):
            name = names[number % len(names)]
            (folder / name).mkdir(exist_ok=True)
            raw = mutated(name, random.Random(number))
            if at is not None:
                at[:8] = number.to_bytes(8, "little")
            began = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                getattr(targets, name)(folder / name, raw)
            except Exception as error:
                kept.mkdir(parents=True, exist_ok=True)
                (kept / f"{name}-{number}").write_bytes(raw)
                result.findings.append(f"{name} {number}: {type(error).__name__}: {error}")
                say(f"{result.findings[-1]}\n{traceback.format_exc()}")
                shutil.rmtree(folder / name, ignore_errors=True)  # what it left may be incomplete
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            result.executions[name] += 1
            result.seconds[name] += time.perf_counter() - began
            if len(result.findings) >= MOST_FINDINGS:
                break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def in_child(names: list[str], executions: int, *, first: int, kept: Path, say: Any) -> FuzzCount:
    """`count_findings` in a child process; where that dies, its current input is a finding and the next one follows."""
    at, answer = mmap.mmap(-1, 8), tempfile.NamedTemporaryFile()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what programs print

        def to_stderr(text: str) -> None:
            print(text, file=sys.stderr)

        result = count_findings(names, executions, first=first, kept=kept, say=to_stderr, at=at)
        Path(answer.name).write_text(json.dumps(asdict(result)))
        sys.stderr.flush()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status == 0:
        return FuzzCount(**json.loads(Path(answer.name).read_text()))
    number = int.from_bytes(at[:8], "little")
    name = names[number % len(names)]
    kept.mkdir(parents=True, exist_ok=True)
    (kept / f"{name}-{number}").write_bytes(mutated(name, random.Random(number)))
    finding = f"{name} {number}: the process died of {os.waitstatus_to_exitcode(status)}"
    say(finding)
    done = number + 1 - first
    result = FuzzCount(dict.fromkeys(names, 0), dict.fromkeys(names, 0.0), [finding])
    for met in range(first, number + 1):
        result.executions[names[met % len(names)]] += 1
    if done < executions:
        result.add(in_child(names, executions - done, first=number + 1, kept=kept, say=say))
    return result


def raise_timeout(*_: Any) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def main() -> int:
    """The program; 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input")
    parser.add_argument("--only", choices=list(MAKERS), help="one target")
    parser.add_argument("--kept", type=Path, default=Path("fuzz-findings"), help="folder for what was found")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, raise_timeout)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    names = [options.only] if options.only else TURNS

    def say(text: str) -> None:
        print(text, flush=True)

    result, end = FuzzCount(), options.first + options.executions
    for name in set(names):
        seeds(name)  # what makes them is imported before the children begin
    reported = time.monotonic()
    for first in range(options.first, end, CHUNK):
        result.add(in_child(names, min(CHUNK, end - first), first=first, kept=options.kept, say=say))
        if time.monotonic() - reported > 60:
            reported = time.monotonic()
            say(f"{sum(result.executions.values()):,} executions, {len(result.findings)} findings")
        if len(result.findings) >= MOST_FINDINGS:
            break
    say(result.table())
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
