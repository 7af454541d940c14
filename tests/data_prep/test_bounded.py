"""A little that becomes a lot: memory stays flat for every form of compression, and one record has a largest size."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from data_prep import cli, readers
from data_prep.extract import field_extractor
from data_prep.kinds.records import Slice
from data_prep.limits import MB, Limits
from megatron_taipan.data.indexed import IndexedReader

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = 200 * MB
ROOM, GROWTH = 110 * MB, 60 * MB  # of addresses for the child while it reads; and of what it has in memory

# Reads a file under a limit of the system, so that more memory is an error, and tells how much it took.
READ = """
import resource, sys, time
from data_prep import readers
from data_prep.extract import field_extractor
from data_prep.kinds.records import Slice
from data_prep.limits import Limits
import bz2, lzma, tempfile, zstandard
path, room, record = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
before, count, size, problems = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0, set()
piece = Slice(path, 0, readers.size_of(path))
for found in readers.read_records(piece, field_extractor("text"), limits=Limits(record)):
    count += 1
    size += found.size + sum(map(len, found.chunks or ()))
    problems |= {found.problem} - {""}
print(count, size, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), *problems)
"""


def pack(path: Path, begin: bytes, middle: bytes, times: int, end: bytes) -> None:
    """Writes begin + times * middle + end: one stream, but of bzip2, which takes its time, a row of equal ones."""
    ending = path.suffix
    if ending == ".bz2":
        path.write_bytes(bz2.compress(begin, 1) + bz2.compress(middle, 1) * times + bz2.compress(end, 1))
        return
    opened = {
        ".jsonl": lambda: open(path, "wb"),
        ".gz": lambda: gzip.open(path, "wb", 1),
        ".xz": lambda: lzma.open(path, "wb", preset=0),
        ".zst": lambda: zstandard.ZstdCompressor().stream_writer(open(path, "wb")),
    }
    with opened[ending]() as file:
        file.write(begin)
        for _ in range(times):
            file.write(middle)
        file.write(end)


def read(path: Path, record: int) -> tuple[int, int, int, str]:
    """Records, bytes of text, bytes of memory and problems, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(ROOM), str(record)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    count, size, memory, *problems = done.stdout.split(maxsplit=3)
    return int(count), int(size), int(memory), "".join(problems).strip()


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_memory_is_flat(tmp_path, ending):
    """200 MB in lines; in one line; and in one line that is too long."""
    line = json.dumps({"text": "ordinary text " * 300}).encode() + b"\n"
    lines = tmp_path / f"lines.jsonl{ending}"
    per = (4 * MB) // len(line)
    pack(lines, b"", line * per, 50, b"")
    count, size, memory, problem = read(lines, 1024 * MB)
    assert (count, size, problem) == (50 * per, 50 * per * 14 * 300, "")
    assert memory < GROWTH, memory
    one = tmp_path / f"one.jsonl{ending}"
    words = b"ordinary text " * (4 * MB // 14)
    pack(one, b'{"text": "', words, 50, b'"}\n{"text": "next"}\n')
    count, size, memory, problem = read(one, 1024 * MB)
    assert (count, size, problem) == (2, 50 * len(words) + 4, "")
    assert memory < GROWTH, memory
    count, size, memory, problem = read(one, 100 * MB)
    assert (count, size) == (2, 4), "what comes behind a record that is too long is read"
    assert problem == "record too large: over 100 MB; give --max-record-mb more if you want it"
    assert memory < GROWTH, memory


def test_lines_of_a_tiny_zst_are_read_as_fast_as_they_are_from_gz(tmp_path):
    """They took 20 times as long: all that 64 kB unpack to was copied for each MB that was asked for."""
    line = json.dumps({"text": "ordinary text " * 30}).encode() + b"\n"
    times = {}
    for ending in (".gz", ".zst"):
        pack(tmp_path / f"x.jsonl{ending}", b"", line * (4 * MB // len(line)), 50, b"")
        piece = Slice(str(tmp_path / f"x.jsonl{ending}"), 0, 1)
        began = time.perf_counter()
        assert sum(1 for _ in readers.read_records(piece, field_extractor("text"))) > 400_000
        times[ending] = time.perf_counter() - began
    assert times[".zst"] < 3 * times[".gz"], times


@pytest.mark.parametrize("ending", [".zst", ".xz"])
def test_a_window_beyond_the_limit_is_refused_and_the_limit_can_be_changed(tmp_path, model, ending, capsys):
    text = json.dumps({"text": "a document"}).encode() + b"\n"
    if ending == ".zst":
        wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
        raw = zstandard.ZstdCompressor(compression_params=wide).compressobj()
        packed = raw.compress(text) + raw.flush()
    else:
        packed = lzma.compress(text, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 256 * MB}])
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(packed)
    args = ["tokenize", "--input", str(path), "--tokenizer", model, "--output", str(tmp_path / "o")]
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert "takes more memory than the 128 MB of --max-window-mb; give more if you trust it" in error
    assert cli.main([*args, "--max-window-mb", "256"]) == 0
    assert IndexedReader(tmp_path / "o").n_documents == 1


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.jsonl", "x.parquet"])
def test_a_record_beyond_the_limit_is_a_problem_in_every_kind_of_file(tmp_path, model, name, capsys):
    text, path = "ordinary text " * 150_000, tmp_path / name  # 2.1 MB
    if name == "x.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [text, "next"]}), path)
    elif name == "x.jsonl":
        path.write_text(json.dumps({"text": text}) + '\n{"text": "next"}\n')
    else:
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        (tmp_path / "y.txt").write_text("next")
    args = ["tokenize", "--input", str(tmp_path), "--tokenizer", model, "--output", str(tmp_path / "out" / "o")]
    assert cli.main([*args, "--max-record-mb", "2"]) == 2
    assert "record too large: over 2 MB; give --max-record-mb more" in capsys.readouterr().err
    assert cli.main([*args, "--max-record-mb", "2", "--on-error", "skip"]) == 0
    assert IndexedReader(tmp_path / "out" / "o").n_documents == 1
    assert cli.main([*args, "--max-record-mb", "3", "--on-error", "skip", "--overwrite"]) == 0, "an option of identity"
    assert IndexedReader(tmp_path / "out" / "o").n_documents == 2
    assert cli.main([*args, "--max-record-mb", "0"]) == 2


def test_a_row_of_frames_of_every_size_and_form(tmp_path):
    """Blocks are found in whatever the format allows: no content size, a checksum, frames to be passed over."""
    content = b"".join(b'{"text": "number %d"}\n' % n for n in range(100_000))
    frames = []
    for at in range(0, len(content), 300_000):
        part = content[at : at + 300_000]
        turn = len(frames) % 4
        compressor = zstandard.ZstdCompressor(write_checksum=turn % 2 == 0, write_content_size=turn < 2)
        if turn == 3:
            stream = compressor.compressobj()
            blocks = [stream.compress(part[i : i + 777]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
                      for i in range(0, len(part), 777)]  # fmt: skip
            frames.append(b"".join(blocks) + stream.flush())
        else:
            frames.append(compressor.compress(part))
        frames.append(b"\x5a\x2a\x4d\x18" + (at // 3).to_bytes(4, "little") + bytes(at // 3))
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(b"".join(frames))
    found = [r.text for r in readers.read_records(Slice(str(path), 0, 1), field_extractor("text"), None, Limits())]
    assert found == [f"number {n}" for n in range(100_000)]
