"""All faults that are tried. A case disturbs a run, and then checks that the same command ends with the undisturbed
weights."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_taipan.checkpoint.folder import checkpoints, incomplete
from megatron_taipan.errors import EXIT_HANG, EXIT_REQUEUE, EXIT_UNSAVED
from tests.checkpoint.folders import rehash
from tests.faults.bench import LAYOUTS, STEPS, Bench, CaseRun, fill_disk, remount, small_file_system
from tests.faults.zygote import TrainingJob, send

DIED_OF_SIGTERM = 128 + signal.SIGTERM


def make_run(bench: Bench, name: str, seed: int, **sections: dict) -> CaseRun:
    """The run of a case: its layout, and whether it saves in the background, follow from the seed."""
    layout = list(LAYOUTS)[seed % len(LAYOUTS)]
    bench.reference(layout)  # the undisturbed run comes first
    checkpoint = sections.pop("checkpoint", {}) | {"asynchronous": seed // len(LAYOUTS) % 2 == 0}
    return CaseRun(bench, name, layout, seed, checkpoint=checkpoint, **sections)


def killed(run: CaseRun, job: TrainingJob, before: int) -> None:
    """After a SIGKILL: all processes end by themselves, and no complete checkpoint is lost."""
    job.wait()
    assert run.newest() >= before, f"checkpoint {before} was complete and is gone"


def met(run: CaseRun, job: TrainingJob) -> None:
    """The kill must have come before the run was done: a later one would show nothing."""
    assert run.newest() < STEPS, f"the kill came after the end\n{job.output()}"


# ---- killed ----


def kill_a_rank(bench: Bench, seed: int) -> None:
    """SIGKILL to a random rank at a random instant; its launcher ends the other."""
    run = make_run(bench, "kill a rank", seed)
    job = run.start()
    run.random_moment(job)
    before, victim = run.newest(), run.rng.choice(job.ranks)
    send(victim, signal.SIGKILL)
    killed(run, job, before)
    met(run, job)
    run.continues_the_same()


def kill_everything(bench: Bench, seed: int) -> None:
    """SIGKILL to launcher and ranks at once, as in a power failure (except for what the disk cache held)."""
    run = make_run(bench, "kill everything", seed)
    job = run.start()
    run.random_moment(job)
    before = run.newest()
    job.kill()
    killed(run, job, before)
    met(run, job)
    run.continues_the_same()


def kill_the_launcher(bench: Bench, seed: int) -> None:
    """SIGKILL to the launcher alone: the ranks notice, save and end."""
    run = make_run(bench, "kill the launcher", seed)
    job = run.start()
    run.random_moment(job)
    before = run.newest()
    send(job.launcher, signal.SIGKILL)
    killed(run, job, before)
    met(run, job)
    run.continues_the_same()


def kill_at_a_file_operation(bench: Bench, seed: int) -> None:
    """A rank dies just before one of the file operations of its saves (open, fsync, rename, delete, ...)."""
    run = make_run(bench, "kill at a file operation", seed)
    rank = run.rng.randrange(2)
    nth = run.rng.randint(1, run.reference.operations[rank])
    job = run.start({"rank": rank, "kill_at_operation": nth})
    job.wait()
    assert any(job.status(pid) == -signal.SIGKILL or job.status(pid) == -1 for pid in job.ranks), "no rank died"
    run.continues_the_same()


def kill_the_writer(bench: Bench, seed: int) -> None:
    """SIGKILL to a random rank while files of a checkpoint are being written, slowed down for this."""
    run = make_run(bench, "kill the writer", seed)
    job = run.start({"slow_writes": 0.002})
    save = run.rng.randint(1, 5)

    def in_save() -> bool:
        return len(run.records("save")) >= save - 1 and any(run.directory.glob("step_*.tmp/state/*"))

    run.wait_until(in_save, job, f"save {save}")
    time.sleep(run.rng.uniform(0, 0.1))
    before = run.newest()
    send(run.rng.choice(job.ranks), signal.SIGKILL)
    killed(run, job, before)
    met(run, job)
    run.continues_the_same()


def kill_again_and_again(bench: Bench, seed: int) -> None:
    """Three starts in a row are killed, the later ones while they resume or soon after."""
    run = make_run(bench, "kill again and again", seed)
    killed_at_some_moment(run, first=4)
    for _ in range(2):
        before = run.newest()
        job = run.start()
        time.sleep(run.rng.uniform(0, 1.3 * run.reference.start_s))
        job.kill()
        killed(run, job, before)
    run.continues_the_same()


# ---- asked to stop ----


def asked_to_stop(run: CaseRun, job: TrainingJob, allowed: tuple[int, ...] = (EXIT_REQUEUE,)) -> None:
    """After a SIGTERM: the status asks for a new start, the work until then is saved, the same command continues."""
    status = job.wait()
    done = max(run.losses(), default=0)
    if done < STEPS:
        assert status in allowed, f"ended with {status} at step {done}\n{job.output()}"
    if status == EXIT_REQUEUE:
        assert run.newest() == done, f"step {done} was done and only {run.newest()} is saved"
    run.continues_the_same()


def sigterm_in_a_step(bench: Bench, seed: int) -> None:
    """SIGTERM at a random instant, to one rank or to the launcher."""
    run = make_run(bench, "sigterm in a step", seed)
    job = run.start()
    run.random_moment(job, first=1)
    send(run.rng.choice([job.launcher, *job.ranks]), signal.SIGTERM)
    asked_to_stop(run, job)


def sigterm_in_a_save(bench: Bench, seed: int) -> None:
    """SIGTERM when a rank begins to copy or to write its part of a checkpoint."""
    run = make_run(bench, "sigterm in a save", seed)
    hook, nth = run.rng.choice(["save", "write"]), run.rng.randint(1, 4)
    asked_to_stop(run, run.start({"rank": run.rng.randrange(2), "signal_in": hook, "nth": nth}))


def sigterm_in_an_evaluation(bench: Bench, seed: int) -> None:
    """SIGTERM when a validation begins; the first one comes before the first step."""
    run = make_run(bench, "sigterm in an evaluation", seed)
    inside = {"rank": run.rng.randrange(2), "signal_in": "evaluate", "nth": run.rng.randint(1, 3)}
    asked_to_stop(run, run.start(inside))


def sigterm_at_start(bench: Bench, seed: int) -> None:
    """SIGTERM at a random instant before the first step; before the ranks have met there is nothing to finish."""
    run = make_run(bench, "sigterm at start", seed)
    job = run.start()
    time.sleep(run.rng.uniform(0, 0.9 * run.reference.start_s))
    send(job.launcher, signal.SIGTERM)
    asked_to_stop(run, job, (EXIT_REQUEUE, DIED_OF_SIGTERM))


# ---- the file system ----


def full_disk(bench: Bench, seed: int) -> None:
    """The disk is full for a while: every failed save raises an alarm, training goes on, and the last ones succeed."""
    run = make_run(bench, "full disk", seed, checkpoint={"retry_s": 0.3})
    with small_file_system(run.directory, "8m"):
        job = run.start()
        run.wait_for_step(run.rng.randint(1, STEPS - 5), job)
        before = run.newest()
        filler = fill_disk(run.directory)
        run.wait_until(lambda: "No space left" in job.output(), job, "the alarm")
        assert run.newest() >= before
        filler.unlink()
        assert job.wait() == 0, job.output()
        run.is_the_same()


def full_disk_to_the_end(bench: Bench, seed: int) -> None:
    """The disk stays full: the run ends with the status for it, the checkpoint before is whole."""
    run = make_run(bench, "full disk to the end", seed, checkpoint={"retry_s": 0.1})
    with small_file_system(run.directory, "8m"):
        job = run.start()
        run.wait_until(lambda: run.newest() > 0, job, "a checkpoint")
        before, filler = run.newest(), fill_disk(run.directory)
        assert job.wait() == EXIT_UNSAVED, job.output()
        assert run.newest() >= before
        filler.unlink()
        run.continues_the_same()


def read_only_file_system(bench: Bench, seed: int) -> None:
    """The file system becomes read-only for a while, as after a disk error."""
    run = make_run(bench, "read-only file system", seed, checkpoint={"retry_s": 0.3})
    with small_file_system(run.directory, "32m"):
        job = run.start()
        run.wait_for_step(run.rng.randint(1, STEPS - 5), job)
        remount(run.directory, "ro")
        run.wait_until(lambda: "Read-only file system" in job.output(), job, "the alarm")
        remount(run.directory, "rw")
        assert job.wait() == 0, job.output()
        run.is_the_same()


def folder_vanishes(bench: Bench, seed: int) -> None:
    """The run's folder is moved away: it is created again, with an alarm, and the next checkpoint goes there."""
    run = make_run(bench, "folder vanishes", seed, checkpoint={"retry_s": 0.3})
    job = run.start()
    run.random_moment(job, first=1, last=STEPS - 4)
    os.rename(run.directory, run.home / "moved away")
    assert job.wait() == 0, job.output()
    assert "vanished" in job.output(), job.output()
    run.is_the_same()


def folder_vanishes_and_killed(bench: Bench, seed: int) -> None:
    """The same, and then a kill: what was saved since is found, or the run starts from its first step."""
    run = make_run(bench, "folder vanishes and killed", seed, checkpoint={"retry_s": 0.3})
    job = run.start()
    run.random_moment(job, first=1)
    os.rename(run.directory, run.home / "moved away")
    time.sleep(run.rng.uniform(0, 4 * run.reference.step_s))
    job.kill()
    job.wait()
    run.continues_the_same()


# ---- damaged checkpoints ----


def killed_at_some_moment(run: CaseRun, first: int) -> None:
    """Starts the run and kills it at a random moment from step `first` on."""
    job = run.start()
    run.random_moment(job, first=first)
    job.kill()
    job.wait()


def killed_with_two_checkpoints(run: CaseRun) -> Path:
    """Starts the run and kills it once it has two; returns the newest whole one."""
    job = run.start()
    run.wait_until(lambda: run.newest() >= 6, job, "two checkpoints")
    job.kill()
    job.wait()
    return [path for path in checkpoints(run.directory) if incomplete(path) is None][-1]


def damaged(bench: Bench, seed: int, name: str, damage: Callable[[CaseRun, Path], None]) -> None:
    """Stops a run, damages its newest checkpoint, and checks that it is passed over."""
    run = make_run(bench, name, seed)
    newest = killed_with_two_checkpoints(run)
    damage(run, newest)
    run.continues_the_same()
    notes = [r["text"] for r in run.records("warning")]
    assert any(newest.name in text for text in notes), (
        f"the log does not say that {newest.name} was passed over: {notes}"
    )


def some_file(run: CaseRun, path: Path) -> Path:
    """A random file of a checkpoint that its manifest lists."""
    return run.rng.choice(sorted(p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"))


def newest_truncated(bench: Bench, seed: int) -> None:
    """A file of the newest checkpoint is cut short."""

    def damage(run: CaseRun, path: Path) -> None:
        file = some_file(run, path)
        os.truncate(file, run.rng.randrange(file.stat().st_size))

    damaged(bench, seed, "newest truncated", damage)


def newest_bit_flipped(bench: Bench, seed: int) -> None:
    """One bit of the newest checkpoint is flipped; its size is right."""

    def damage(run: CaseRun, path: Path) -> None:
        file = some_file(run, path)
        content = bytearray(file.read_bytes())
        content[run.rng.randrange(len(content))] ^= 1 << run.rng.randrange(8)
        file.write_bytes(content)

    damaged(bench, seed, "newest bit flipped", damage)


def newest_incomplete(bench: Bench, seed: int) -> None:
    """A file of the newest checkpoint, or its manifest, is missing or is not JSON."""

    def damage(run: CaseRun, path: Path) -> None:
        choice = run.rng.randrange(3)
        if choice == 0:
            some_file(run, path).unlink()
        elif choice == 1:
            (path / "manifest.json").unlink()
        else:
            (path / "manifest.json").write_text("{")

    damaged(bench, seed, "newest incomplete", damage)


# ---- malicious files, and numbers that are not finite ----


def refused(bench: Bench, seed: int, name: str, damage: Callable[[CaseRun, Path], str]) -> None:
    """Stops a run and rewrites its newest checkpoint, whose manifest agrees: the next start says in one line what is
    wrong and changes nothing; without that checkpoint the same command continues from the one before.

    Args:
        damage: returns words of that line.
    """
    run = make_run(bench, name, seed)
    newest = killed_with_two_checkpoints(run)
    words = damage(run, newest)
    rehash(newest)
    is_refused(run, words)
    shutil.rmtree(newest)
    run.continues_the_same()


def is_refused(run: CaseRun, words: str) -> None:
    """A start ends with status 2, with one line that has these words, and with the checkpoints that were there."""

    def there() -> list[str]:  # without what a killed save left behind, which every start removes
        return sorted(path.name for path in run.directory.iterdir() if path.suffix != ".tmp")

    before = there()
    job = run.start()
    status, text = job.wait(), job.output()
    assert status == 2 and words in text and "Traceback" not in text, f"{status}: {text}"
    assert [line for line in text.splitlines() if line.startswith("error: ")], text
    assert there() == before


def newest_of_wrong_types(bench: Bench, seed: int) -> None:
    """Progress, index or random states of the newest checkpoint are of another type, its manifest is right: refused."""

    def damage(run: CaseRun, path: Path) -> str:
        choice = run.rng.randrange(4)
        if choice == 0:
            file = path / "state" / "rank_00000.safetensors"
            save_file(load_file(file) | {"python|random": torch.zeros(run.rng.randrange(9), dtype=torch.uint8)}, file)
            return "random numbers of python is damaged"
        name, keys, value, words = [
            ("metadata.json", ("progress", "samples"), "many", "progress.samples"),
            ("metadata.json", ("identity",), [], "identity: "),
            ("state/index.json", ("optimizer_step",), None, "optimizer_step"),
        ][choice - 1]
        rewrite_json(path / name, keys, value)
        return words

    refused(bench, seed, "newest of wrong types", damage)


def newest_names_other_places(bench: Bench, seed: int) -> None:
    """The newest checkpoint's index names files outside its folder: refused."""

    def damage(run: CaseRun, path: Path) -> str:
        name = run.rng.choice(["../../secret.safetensors", "/etc/passwd", "..", "state/x", "a\0b"])
        index = json.loads((path / "state" / "index.json").read_text())
        parameter = run.rng.choice(sorted(index["parameters"]))
        rewrite_json(path / "state" / "index.json", ("parameters", parameter, 0, 0), name)
        return "not the name of a file beside it"

    refused(bench, seed, "newest names other places", damage)


def newest_nested_without_end(bench: Bench, seed: int) -> None:
    """The newest checkpoint's texts are nested so that reading them would never end, or take all memory: refused."""

    def damage(run: CaseRun, path: Path) -> str:
        if run.rng.random() < 0.5:
            (path / "config.yaml").write_text(LAUGHS)
            return "aliases"
        (path / "metadata.json").write_text("[" * 100_000)
        return "metadata.json cannot be read: too deeply nested"

    refused(bench, seed, "newest nested without end", damage)


def manifest_names_other_places(bench: Bench, seed: int) -> None:
    """The newest checkpoint's manifest names a file outside its folder: it is passed over."""

    def damage(run: CaseRun, path: Path) -> None:
        rewrite_json(
            path / "manifest.json", ("files", run.rng.choice(["../x", "/etc/passwd", ".."])), {"bytes": 1, "sha256": ""}
        )

    damaged(bench, seed, "manifest names other places", damage)


def configuration_nested_without_end(bench: Bench, seed: int) -> None:
    """The configuration is a YAML of aliases of aliases at one start: refused at once; the right one continues."""
    run = make_run(bench, "configuration nested without end", seed)
    killed_at_some_moment(run, first=3)
    write, run.write_config = run.write_config, lambda: [path := write(), path.write_text(LAUGHS)][0]
    is_refused(run, "aliases")
    run.write_config = write
    run.continues_the_same()


def data_damaged(bench: Bench, seed: int) -> None:
    """The data is cut short, changed in its index or gone at one start: refused; once restored, the run continues."""
    run = make_run(bench, "data damaged", seed)
    data = run.home / "data"
    for ending in (".bin", ".idx"):
        shutil.copyfile(f"{bench.prefix}{ending}", f"{data}{ending}")
    run.sections = {**run.sections, "data": {"train": str(data)}}
    killed_at_some_moment(run, first=3)
    victim = Path(f"{data}{run.rng.choice(['.bin', '.idx'])}")
    whole, content = victim.read_bytes(), bytearray(victim.read_bytes())
    match run.rng.randrange(3):
        case 0:
            os.truncate(victim, run.rng.randrange(len(whole)))
        case 1 if victim.suffix == ".idx":
            content[run.rng.randrange(len(whole))] ^= 1 << run.rng.randrange(8)
            victim.write_bytes(content)
        case _:
            victim.unlink()
    is_refused(run, "data")
    victim.write_bytes(whole)
    run.continues_the_same()


def parameters_turn_nan(bench: Bench, seed: int) -> None:
    """An update leaves a parameter that is NaN: no such state is saved, and the last line names a sound checkpoint."""
    run = make_run(bench, "parameters turn nan", seed, train={"max_skipped": 3}, checkpoint={"keep_last": 1})
    at = run.rng.randint(3, STEPS - 4)
    job = run.start({"nan_at_step": at, "victim": run.rng.randrange(2)})
    not_finite(run, job, at)


def loss_not_finite(bench: Bench, seed: int) -> None:
    """From a step on no loss is finite: the run ends with the checkpoint before it, and its last line names it."""
    run = make_run(bench, "loss not finite", seed, train={"max_skipped": 3})
    at = run.rng.randint(3, STEPS - 4)
    not_finite(run, run.start({"loss_nan_from_step": at}), at)


def not_finite(run: CaseRun, job: TrainingJob, at: int) -> None:
    """The run ends by itself; the checkpoint that it names is there and from before."""
    status, text = job.wait(), job.output()
    assert status == 2 and ("3 steps in a row" in text or "is not finite, which no further step" in text), text
    newest = run.newest()
    assert 0 < newest < at + 1 and f"step_{newest:08d} is sound" in text, f"{newest} of {at}: {text}"
    run.continues_the_same()


def rewrite_json(file: Path, keys: tuple, value: Any) -> None:
    """Sets a value deep in a JSON file."""
    content = inside = json.loads(file.read_text())
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    file.write_text(json.dumps(content))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


# ---- others ----


def clock_jumps(bench: Bench, seed: int) -> None:
    """The wall clock of both ranks jumps by up to a year at every reading."""
    run = make_run(bench, "clock jumps", seed, checkpoint={"save_minutes": 60}, train={"hang_after_s": 60})
    job = run.start({"rank": None, "clock": seed})
    assert job.wait() == 0, job.output()
    run.is_the_same()


def second_job(bench: Bench, seed: int) -> None:
    """The same command a second time while it runs: refused by host and process, and the first is not disturbed."""
    run = make_run(bench, "second job", seed)
    job = run.start()
    run.random_moment(job, first=1)
    if not job.running():
        raise AssertionError("the first job ended too early")
    job.pause()  # else it might end before the second one has looked
    second = run.start()
    status, text = second.wait(), second.output()
    job.go_on()
    assert status == 2 and f"process {job.ranks[0]} on {os.uname().nodename}" in text, f"{status}: {text}"
    assert job.wait() == 0, job.output()
    run.is_the_same()


def hang(bench: Bench, seed: int) -> None:
    """A rank never returns from a step: all ranks print their stacks and the job ends."""
    run = make_run(bench, "hang", seed, train={"hang_after_s": 6})
    job = run.start({"rank": seed % 2, "hang_at_step": run.rng.randint(1, STEPS - 2)})
    status, text = job.wait(), job.output()
    assert status == EXIT_HANG, f"{status}: {text}"
    for rank in range(2):
        assert f"rank {rank}: nothing was finished" in text, text
    run.sections = {}
    run.continues_the_same()


KILLS: list[Callable[[Bench, int], None]] = [
    kill_a_rank, kill_at_a_file_operation, kill_the_launcher, kill_the_writer, kill_everything,
    kill_at_a_file_operation, kill_the_writer, kill_again_and_again,
]  # fmt: skip
OTHERS: list[Callable[[Bench, int], None]] = [
    sigterm_in_a_step, sigterm_in_a_save, sigterm_in_an_evaluation, sigterm_at_start, full_disk, full_disk_to_the_end,
    read_only_file_system, folder_vanishes, folder_vanishes_and_killed, newest_truncated, newest_bit_flipped,
    newest_incomplete, newest_of_wrong_types, newest_names_other_places, newest_nested_without_end,
    manifest_names_other_places, configuration_nested_without_end, data_damaged, parameters_turn_nan, loss_not_finite,
    clock_jumps, second_job, hang,
]  # fmt: skip
