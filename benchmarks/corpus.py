"""The benchmark corpus: Debian's documentation packages as JSON lines, in documents of real lengths, each once.

python -m benchmarks.corpus --megabytes 200 --cache FOLDER

HTML becomes text without its menus and scripts; translations are left out. Where the packages hold less than was asked
for, the corpus is shorter: a copy among the held-out documents would be one that training has seen.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from megatron_taipan.errors import UserError
from megatron_taipan.programs import exits_cleanly

PACKAGES = (
    "python3.11-doc postgresql-doc-15 erlang-doc linux-doc-6.1 llvm-14-doc rust-doc openjdk-17-doc git-doc"
    " libboost1.81-doc debian-handbook anarchism vim-doc python-django-doc python-sqlalchemy-doc sqlite3-doc"
    " cppreference-doc-en-html swi-prolog-doc cmake-doc libvirt-doc libreoffice-help-en-us nodejs-doc octave-doc"
).split()
LONG_LINE = 40  # characters from which on a line is likely to identify its document
BLOCKS = "p div li dt dd tr h1 h2 h3 h4 h5 h6 section article table ul ol dl pre br details summary title".split()
UNREAD = "script style nav header footer noscript".split()
NUMBERED = "//*[contains(@class, 'line-numbers')]"  # rustdoc's column of numbers, but also code that gets some


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Builds the corpus that the arguments describe, and prints where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default=str(Path.home() / ".cache/megatron_taipan/benchmark"), help="corpus folder")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the corpus (default: 100)")
    args = parser.parse_args(argv)
    print(build_corpus(Path(args.cache), args.megabytes))


def build_corpus(cache: Path, megabytes: int, *, repeat: bool = False) -> str:
    """Makes a .jsonl of about this size, unless it exists, and returns its path.

    Args:
        megabytes: the document that reaches so many million bytes is the last.
        repeat: fill up with numbered copies of the documents. For timing only: copies end up on both sides of a split.

    Raises:
        UserError: lxml is missing, no package is available, or megabytes is below 1.
    """
    if megabytes < 1:
        raise UserError(f"megabytes={megabytes}: a corpus has at least 1")
    target = cache / f"{'repeated' if repeat else 'distinct'}_{megabytes}.jsonl"
    if target.exists():
        return str(target)
    lxml_html()  # before anything is fetched
    packages = cache / "packages"
    fetch_packages(packages)
    partial = Path(f"{target}.partial")
    write_distinct(packages, partial, megabytes * 1_000_000)
    if repeat:
        append_copies(partial, megabytes * 1_000_000)
    os.replace(partial, target)
    return str(target)


def fetch_packages(packages: Path) -> None:
    """Unpacks every package into a folder of its name, unless it exists."""
    packages.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        if (packages / name).exists():
            continue
        unfinished = packages / f"{name}.partial"
        try:
            subprocess.run(["apt-get", "download", "-qq", name], cwd=packages, check=True, capture_output=True)
            archive = next(packages.glob(f"{name}_*.deb"))
            subprocess.run(["dpkg", "-x", archive, unfinished], check=True, capture_output=True)
            archive.unlink()
            unfinished.rename(packages / name)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            print(f"package {name} is not available ({error}); going on without it", file=sys.stderr)


def write_distinct(packages: Path, target: Path, size: int) -> None:
    """Writes documents of which none repeats another until `size` bytes are reached, and prints their number.

    Raises:
        UserError: there is none.
    """
    new, documents, copies, written = Distinct(), 0, 0, 0
    with open(target, "wb") as out:
        for text in read_documents(packages):
            if not new(text):
                copies += 1
                continue
            written += out.write(json_line(text))
            documents += 1
            if written >= size:
                break
    if not documents:
        raise UserError("no documentation package could be fetched; give a .jsonl file with --corpus")
    print(f"{documents:,} distinct documents, {written / 1e6:.1f} MB; {copies:,} copies left out", file=sys.stderr)
    if written < size:
        print(f"that is all there is: {size / 1e6:.0f} MB were asked for", file=sys.stderr)


class Distinct:
    """Decides whether a document is new or repeats an earlier one.

    A document repeats when it is equal to an earlier one, or when more than half of the characters of its long lines
    are in lines of earlier documents: other versions of a page, sources beside what was made from them, pages that are
    mostly boilerplate.
    """

    def __init__(self) -> None:
        self._documents: set[bytes] = set()
        self._lines: set[int] = set()  # 64-bit hashes: among 10 million lines a false hit is unlikely, and harmless

    def __call__(self, text: str) -> bool:
        digest = blake2b(text.encode(), digest_size=16).digest()
        lines = [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE]
        hashes = [xxh3_64_intdigest(line.encode()) for line in lines]
        known = sum(len(line) for line, key in zip(lines, hashes, strict=True) if key in self._lines)
        if digest in self._documents or 2 * known > sum(map(len, lines)):
            return False
        self._documents.add(digest)
        self._lines.update(hashes)
        return True


def append_copies(target: Path, size: int) -> None:
    """Appends the documents again, each beginning with "Copy 1. ", then 2 and so on, until `size` bytes are reached."""
    distinct, written, turn = target.stat().st_size, target.stat().st_size, 0
    with open(target, "ab") as out:
        while written < size:
            turn += 1
            with open(target, "rb") as source:
                while written < size and source.tell() < distinct:
                    written += out.write(json_line(f"Copy {turn}. {json.loads(source.readline())['text']}"))
    if turn:
        print(f"filled up with copies to {written / 1e6:.1f} MB: for timing only", file=sys.stderr)


def json_line(text: str) -> bytes:
    """One document as a line of the .jsonl."""
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def read_documents(folder: Path) -> Iterator[str]:
    """Text of every HTML page and text file, in a fixed order that mixes the packages."""
    paths = [
        path for name in PACKAGES for kind in ("html", "htm", "txt") for path in (folder / name).rglob(f"*.{kind}")
    ]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    for name in sorted(names, key=lambda name: blake2b(name.encode("utf-8", "surrogateescape")).digest()):
        path = names[name]
        if not path.is_file() or path.is_symlink() or translated(path) or "_sources" in path.parts:
            continue
        data = path.read_bytes()
        text = data.decode("utf-8", "ignore") if path.suffix == ".txt" else text_of_html(data)
        text = "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
        if len(text) > 200:
            yield text.encode("utf-8", "ignore").decode()


def translated(path: Path) -> bool:
    """Whether a folder above is named after translations or a language with its country, such as de-DE."""
    return any(
        part == "translations"
        or (len(part) == 5 and part[2] in "-_" and part[:2].islower() and part[3:].isupper() and part[:2] != "en")
        for part in path.parts
    )


def text_of_html(data: bytes) -> str:
    """The visible text of a page, a line for each block; "" where there is nothing to parse."""
    html = lxml_html()
    try:
        data.decode()
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = "iso-8859-1"
    try:
        page = html.fromstring(data, parser=html.HTMLParser(encoding=encoding))
    except (ValueError, html.etree.ParserError, AssertionError):
        return ""
    numbers = [element for element in page.xpath(NUMBERED) if not re.search(r"[^\d\s]", element.text_content())]
    for element in [*page.iter(*UNREAD), *numbers]:
        if element is not page:
            element.drop_tree()
    for element in page.iter(*BLOCKS, "td", "th"):
        element.tail = (" " if element.tag in ("td", "th") else "\n") + (element.tail or "")
    return page.text_content()


def lxml_html() -> Any:
    """The module lxml.html.

    Raises:
        UserError: it is not installed.
    """
    try:
        from lxml import html
    except ImportError as error:
        raise UserError(
            "the corpus is made of HTML, and reading it needs the package lxml; `pip install --constraint"
            " constraints.txt lxml`, or give a .jsonl file with --corpus"
        ) from error
    return html


if __name__ == "__main__":
    sys.exit(main())
