"""What would be left after a power cut: no test can make one, so the calls that guard against it are watched."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


class Killed(BaseException):
    """Nothing that handles errors runs after it."""


class Watched:
    """`names`: what was given its name, in order; `folders`: those in which a name was given and is not durable yet."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.folders: set[Path] = set()


@contextmanager
def watched_renames(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Requires of every file that is renamed, itself or in a folder, that its content is on the disk already."""
    seen, flushed = Watched(), {}
    fsync, moves = os.fsync, {name: getattr(os, name) for name in ("rename", "replace")}

    def watched_fsync(handle: int) -> None:
        fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            seen.folders.discard(path)
        else:
            flushed[os.fstat(handle).st_ino] = path.read_bytes()

    def watched(move):
        def call(source, target):
            source, target = Path(source), Path(target)
            files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
            lost = [path.name for path in files if flushed.get(path.stat().st_ino) != path.read_bytes()]
            assert not lost, f"{target.name} gets its name before {', '.join(lost)} is on the disk"
            move(source, target)
            seen.names.append(target.name)
            seen.folders.add(target.parent.resolve())

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched_fsync)
        for name, move in moves.items():
            patch.setattr(os, name, watched(move))
        yield seen


@contextmanager
def killed_at(
    monkeypatch: pytest.MonkeyPatch, number: int, names: Sequence[str] = ("rename", "replace", "unlink")
) -> Iterator[list[int]]:
    """Ends what runs in it, without an error coming out, before call `number` (from 1) of these functions of `os`; the
    list that it gives then holds the number."""
    calls, ended = 0, []

    def counted(real):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed
            return real(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            yield ended
        except Killed:
            ended.append(number)
