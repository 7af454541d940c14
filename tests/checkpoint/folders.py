"""Complete checkpoints of a few bytes, to try the folder's protocol on."""

import json
from pathlib import Path

from megatron_taipan.checkpoint.files import size_and_sha256
from megatron_taipan.checkpoint.folder import METADATA, folder_name, publish, read_manifest, write_manifest


def make(directory: Path, step: int, text: str = "weights") -> Path:
    """A complete checkpoint."""
    temporary = directory / (folder_name(step) + ".tmp")
    (temporary / "state").mkdir(parents=True)
    (temporary / "state" / "w.pt").write_text(f"{text} {step}")
    (temporary / METADATA).write_text(json.dumps({"format": 1, "progress": {"step": step}, "identity": {}}))
    names = ["state/w.pt", METADATA]
    write_manifest(temporary, {name: size_and_sha256(temporary / name, flush=True) for name in names})
    publish(temporary, directory / folder_name(step))
    return directory / folder_name(step)


def rehash(path: Path, *more: str) -> None:
    """Makes the manifest agree with the checkpoint's files, which were changed, and lists `more` in it."""
    names = {*read_manifest(path), *more}
    write_manifest(path, {name: size_and_sha256(path / name, flush=False) for name in names})
