"""The benchmark corpus: documentation packages of Debian as JSON lines, in documents of real lengths."""

import json
import os
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

PACKAGES = (
    "python3.11-doc postgresql-doc-15 erlang-doc linux-doc-6.1 llvm-14-doc rust-doc openjdk-17-doc git-doc"
    " libboost1.81-doc debian-handbook gnome-user-docs"
).split()


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
