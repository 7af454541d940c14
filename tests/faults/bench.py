"""The bench for faults: a training run that is always the same, disturbed, continued, and compared bit for bit."""

import hashlib
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_taipan.checkpoint.folder import checkpoints, incomplete, read_manifest, step_of
from tests.faults.zygote import TrainingJob, Zygote
from tests.train.runs import records
from tests.train.toy import toy_tree, write_data

STEPS, SAVE_EVERY, EVAL_EVERY = 12, 2, 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "2 data, ZeRO 1": {"zero_stage": 1},
    "2 data, ZeRO 3": {"zero_stage": 3},
    "2 tensor, ZeRO 2": {"zero_stage": 2, "tensor": 2},
    "2 stages": {"zero_stage": 1, "pipeline": 2},
    "2 data, a run in three stages": {"zero_stage": 1},
}
IN_STAGES: list[dict[str, Any]] = [  # a border between two saves, and one at a save
    {"steps": 5},
    {"steps": 3, "data": {"seq_len": 32}, "train": {"global_batch": 6}},
    {"steps": STEPS - 8, "train": {"micro_batch": 2}, "optim": {"schedule": "linear", "lr": 5e-3, "min_lr": 0.0}},
]


class Unavailable(Exception):
    """The fault cannot be made on this machine; the text says why."""


@dataclass
class Reference:
    """The undisturbed run of one layout."""

    state: dict[str, str]  # SHA-256 of every file of the last checkpoint's tensors
    losses: dict[int, float]  # by step
    operations: list[int]  # file operations of each rank's saves
    start_s: float  # until the first step is done
    step_s: float


@dataclass
class Bench:
    """Zygote, data and references; one for all cases."""

    root: Path
    zygote: Zygote = field(default_factory=Zygote)
    references: dict[str, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.prefix = write_data(self.root / "data")

    def reference(self, layout: str) -> Reference:
        """The undisturbed run, made at the first call."""
        if layout not in self.references:
            run = CaseRun(self, f"reference {layout}", layout, seed=0)
            began = time.monotonic()
            job = run.start({"count": True})
            run.wait_for_step(1, job)
            start_s = time.monotonic() - began
            status = job.wait()
            assert status == 0, f"the undisturbed run ended with {status}\n{job.output()}"
            counts = [int(text.rpartition("operations: ")[2].split()[0]) for text in job.outputs()]
            seconds = (time.monotonic() - began - start_s) / (STEPS - 1)
            self.references[layout] = Reference(run.state(), run.losses(), counts, start_s, seconds)
        return self.references[layout]

    def close(self) -> None:
        self.zygote.close()


class CaseRun:
    """One run in its own folder: started, disturbed, started again by the same command."""

    def __init__(self, bench: Bench, name: str, layout: str, seed: int, **sections: dict[str, Any]):
        self.bench, self.layout = bench, layout
        self.rng = random.Random(f"{name} {seed}")
        self.home = bench.root / f"{name} {seed}".replace(" ", "-").replace(",", "")
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        self.directory = self.home / "run"
        self.sections = sections
        self.starts = 0

    @property
    def reference(self) -> Reference:
        return self.bench.reference(self.layout)

    def start(self, inside: dict[str, Any] | None = None) -> TrainingJob:
        """The training program, always the same command."""
        self.starts += 1
        return self.bench.zygote.start(self.write_config(), self.home / f"start{self.starts}", inside=inside)

    def write_config(self) -> Path:
        """The configuration's file, the same at every start."""
        tree = toy_tree(
            self.bench.prefix, self.directory,
            parallel=LAYOUTS[self.layout] | {"timeout_s": 60},
            data={"train": self.bench.prefix, "seq_len": 16},
            train={"steps": STEPS, "global_batch": 4, "micro_batch": 1, "precision": "fp32", "eval_every": EVAL_EVERY,
                   "eval_samples": 2},
            checkpoint={"dir": str(self.directory), "save_every": SAVE_EVERY, "keep_last": 3},
            log={"every": 1},
        )  # fmt: skip
        tree["model"] |= {"pattern": "M S" if self.layout != "2 stages" else "M S M", "d_model": 16, "d_ff": 16}
        if "three stages" in self.layout:
            tree["stages"] = IN_STAGES
        for name, options in self.sections.items():
            tree[name] = tree[name] | options
        config = self.home / "config.yaml"
        config.write_text(yaml.safe_dump(tree))
        return config

    # ---- what can be seen from outside ----

    def records(self, event: str | None = None) -> list[dict[str, Any]]:
        """The log's whole lines so far."""
        try:
            return [record for record in records(self.directory) if event in (None, record["event"])]
        except OSError:  # some faults take the file away
            return []

    def losses(self) -> dict[int, float]:
        return {r["step"]: r["ce"] for r in self.records("step")}

    def newest(self) -> int:
        """The step of the newest complete checkpoint; 0 without one."""
        return max((step_of(p) or 0 for p in checkpoints(self.directory) if incomplete(p) is None), default=0)

    def state(self) -> dict[str, str]:
        """SHA-256, computed now, of every file of the last checkpoint's tensors."""
        path = self.directory / f"step_{STEPS:08d}"
        files = sorted((path / "state").glob("*.safetensors"))
        found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        promised = {Path(name).name: entry[1] for name, entry in read_manifest(path).items()}
        assert found and all(promised[name] == digest for name, digest in found.items()), "the manifest is wrong"
        return found

    # ---- moments ----

    def wait_until(self, condition: Callable[[], bool], job: TrainingJob, what: str, timeout: float = 90.0) -> bool:
        """Until the condition holds; False if the job ended before."""
        end = time.monotonic() + timeout
        while not condition():
            if not job.running():
                return condition()
            if time.monotonic() > end:
                job.kill()
                raise AssertionError(f"{what} never came\n{job.output()}")
            time.sleep(0.003)
        return True

    def wait_for_step(self, step: int, job: TrainingJob) -> bool:
        return self.wait_until(lambda: any(r["step"] >= step for r in self.records("step")), job, f"step {step}")

    def random_moment(self, job: TrainingJob, first: float = 0.0, last: float = STEPS - 2) -> None:
        """Waits until a random instant between two steps; by default, between the run's start and its last steps."""
        moment = self.rng.uniform(first, last)
        if moment < 1:
            time.sleep(self.rng.uniform(0, self.reference.start_s))
        else:
            self.wait_for_step(int(moment), job)
            time.sleep((moment - int(moment)) * self.reference.step_s)

    # ---- the end of every case ----

    def continues_the_same(self) -> None:
        """The same command again: it must end well, with the weights and losses of the undisturbed run."""
        killed_after = self._killed_after()
        job = self.start()
        status = job.wait()
        assert status == 0, f"the same command ended with {status}\n{job.output()}"
        if killed_after:
            assert [r["step"] for r in self.records("killed")][-1:] != [], "the killed run's summary is missing"
        self.is_the_same()

    def is_the_same(self) -> None:
        """The finished run against the undisturbed one."""
        assert self.state() == self.reference.state, "the final weights differ"
        ours = self.losses()
        different = [s for s in ours if ours[s] != self.reference.losses[s]]
        assert not different, f"the losses differ at steps {different}"
        leftovers = [path.name for path in self.directory.glob("*.tmp")]
        assert not leftovers, f"left behind: {leftovers}"

    def _killed_after(self) -> int | None:
        """The last step of a start that logged steps and no end."""
        last = None
        for record in self.records():
            if record["event"] in ("end", "killed", "start"):
                last = None
            elif record["event"] == "step":
                last = record["step"]
        return last


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[None]:
    """A tmpfs of that size mounted at `folder`.

    Raises:
        Unavailable: this process may not mount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        raise Unavailable(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, how: str) -> None:
    """Remounts as `ro` or `rw`; retried, since `ro` is refused while a file is being written."""
    for _ in range(500):
        if subprocess.run(["mount", "-o", f"remount,{how}", folder], capture_output=True).returncode == 0:
            return
        time.sleep(0.01)
    raise Unavailable(f"cannot remount {folder} {how}")


def fill_disk(folder: Path) -> Path:
    """Takes all the space that is left; returns the file that holds it."""
    filler = folder / "filler"
    with open(filler, "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return filler
