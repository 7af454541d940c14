"""Files on other machines (s3://, gs://, hf://, https://, whatever fsspec knows), fetched into the folder OUTPUT.spool.

A file is known by its address, its size and its tag (the ETag, or what the store has instead). What was fetched is kept
with a note of these, written last, so a run that was killed fetches only what is missing, and a file that has changed
meanwhile is another input.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from data_prep import folders
from data_prep.inputs import natural
from data_prep.kinds.registry import input_kind, known_endings
from megatron_taipan.data.indexed import sync_and_close
from megatron_taipan.errors import UserError

FETCH_BYTES = 4 << 20  # at a time
# what stores call the mark of a content, best first; the last are times of its last change
TAGS = "ETag etag md5Hash blob_id checksum Content-MD5 LastModified Last-Modified updated mtime created".split()


@dataclass(frozen=True)
class RemoteFile:
    """One remote file: its address, bytes and tag (empty where the store has none)."""

    url: str
    bytes: int
    etag: str


def is_remote(name: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", name) is not None


def find(name: str, folder: str) -> dict[str, RemoteFile]:
    """The files of an address, a folder or a glob, in natural order, by the paths in `folder` that they are fetched to.

    Raises:
        UserError: a package is missing, the store refuses, or nothing there is of a known kind.
    """
    with _told(name):
        fs, path = _store(name)
        if urlsplit(name).scheme in ("http", "https") or fs.isfile(path):  # folders of the web are pages
            found = [path]
        elif glob.has_magic(path):
            found = [entry for entry in fs.glob(path) if fs.isfile(entry)]
        else:
            found = fs.find(path)
        taken = found if found == [path] else [entry for entry in found if _is_data(entry.removeprefix(path))]
        abouts = {entry: fs.info(entry) for entry in taken}
    if not taken or not input_kind(_name(taken[0])):
        there = folders.counted(folders.skipped_as(_name(entry)) for entry in found) or "nothing is there"
        raise UserError(f"{name} gives no file of a known kind ({there}); known are {known_endings()}")
    if found != [path]:
        folders.print_passed_over(
            name, (folders.skipped_as(_name(entry)) for entry in found if entry not in abouts), taken
        )
    sources = {}
    for entry in sorted(taken, key=natural):
        url, about = fs.unstrip_protocol(entry), abouts[entry]
        if about.get("size") is None:
            raise UserError(f"{url}: the server does not say its size, without which no run can go on; fetch it first")
        tag = next((str(about[key]) for key in TAGS if about.get(key)), "")
        place = os.path.join(folder, hashlib.sha256(url.encode()).hexdigest()[:16] + "-" + _name(entry))
        sources[place] = RemoteFile(url, int(about["size"]), tag)
    return sources


def fetch(sources: dict[str, RemoteFile]) -> None:
    """Brings all files that are not there yet, each whole or not at all.

    Raises:
        UserError: a transfer broke off, or a file changed during it; what arrived whole is kept.
    """
    for number, (place, source) in enumerate(sources.items(), 1):
        note = Path(place + ".source")
        wanted = orjson.dumps(asdict(source))
        if note.exists() and note.read_bytes() == wanted and os.path.exists(place):
            continue
        print(f"fetching {source.url} ({number} of {len(sources)}, {source.bytes / 1e6:.1f} MB)")
        os.makedirs(os.path.dirname(place), exist_ok=True)
        note.unlink(missing_ok=True)
        with open(place + ".partial", "wb") as file:
            for block in _blocks(source.url):
                file.write(block)
            size = file.tell()
            sync_and_close(file)
        if size != source.bytes or _tag(source.url) != source.etag:
            raise UserError(
                f"{source.url} changed while it was fetched, or broke off ({size} of {source.bytes} bytes); the same"
                " command fetches it again"
            )
        os.replace(place + ".partial", place)
        note.write_bytes(wanted)


def _blocks(url: str) -> Iterator[bytes]:
    with _told(url):
        fs, path = _store(url)
        file = fs.open(path, "rb")
    with file:
        while True:
            with _told(url):  # not around the yield: what goes wrong with the disk is none of the store's
                block = file.read(FETCH_BYTES)
            if not block:
                return
            yield block


def _tag(url: str) -> str:
    """As a store has it now, not as this process saw it before."""
    with _told(url):
        fs, path = _store(url)
        fs.invalidate_cache()
        about = fs.info(path)
    return next((str(about[key]) for key in TAGS if about.get(key)), "")


def _is_data(path: str) -> bool:
    """As of a folder here: nothing below a folder whose name begins with a dot."""
    return folders.is_data(_name(path)) and not any(part.startswith(".") for part in path.split("/"))


def _store(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    return url_to_fs(url)


def _name(path: str) -> str:
    """The last part of an address, without what follows `?`."""
    return os.path.basename(urlsplit(path).path if "://" in path else path)


@contextmanager
def _told(url: str) -> Iterator[None]:
    """What a store or its library says, in one line. They have no common type of error."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{url}: reading it takes packages of the extra `remote` ({_line(error)}); pip install"
            " 'megatron-taipan[remote]'"
        ) from error
    except Exception as error:
        raise UserError(f"{url} cannot be read: {_line(error)}; the same command tries again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
