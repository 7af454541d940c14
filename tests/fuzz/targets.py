"""Functions that fuzzers call with bytes: they return, or raise a UserError in one line; anything else is a finding."""

import bz2
import gzip
import lzma
import os
import shutil
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import zstandard

from checkpoints.carried import special_of
from checkpoints.checksums import read_sums
from checkpoints.foreign.files import read_settings, weight_files
from checkpoints.run_metrics import last_validation
from data_prep import inputs, long_text, manifest, readers
from data_prep import packed as packing
from data_prep.extract import field_extractor, template_extractor
from data_prep.kinds import records
from data_prep.kinds.records import Slice
from data_prep.limits import MB, Limits
from data_prep.recipes import Recipe, load_recipe
from megatron_taipan.checkpoint.calibration import read_capacity, read_thresholds
from megatron_taipan.checkpoint.folder import CONFIG, incomplete
from megatron_taipan.checkpoint.metadata import Progress, read_metadata
from megatron_taipan.checkpoint.randomness import set_random_states
from megatron_taipan.checkpoint.reader import INDEX, StateReader
from megatron_taipan.checkpoint.weights import open_export
from megatron_taipan.config_loading import load_config
from megatron_taipan.data import manifests
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.made_with import added_ids, tokenizer_of
from megatron_taipan.data.sources import find_pairs
from megatron_taipan.errors import UserError
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.tokenizer import special_tokens
from tests.fuzz.seeds import BESIDE, ENDINGS, STATE_FILES, TABLES, checkpoint

MAGIC = {".gz": packing.GZIP[0], ".zst": packing.ZSTANDARD[0], ".bz2": packing.BZIP2[0], ".xz": packing.XZ[0]}
ROOT = Path(__file__).resolve().parents[2]


def index(folder: Path, data: bytes) -> None:
    """The first two bytes say how long the .bin is, the others are the .idx: refused, or consistent with itself."""
    size, idx = int.from_bytes(data[:2], "little"), data[2:]
    (folder / "x.idx").write_bytes(idx)
    (folder / "x.bin").write_bytes(bytes(size))
    try:
        reader = IndexedReader(folder / "x")
    except UserError:
        return
    lengths = [len(reader.document(i)) for i in range(reader.n_documents)]
    assert sum(lengths) == reader.n_tokens and reader.n_tokens * reader.dtype.itemsize == size
    begins, _ = reader.boundaries(np.array([0]), np.array([reader.n_tokens]))
    assert sorted(set(begins.tolist())) == begins.tolist() and all(0 <= at < reader.n_tokens for at in begins)


def lines(folder: Path, data: bytes) -> None:
    """The first byte is the size of blocks, the others are JSON lines: both ways of reading them agree, and every
    line that is not blank gives one record."""
    block, raw = data[:1][0] + 1 if data else 1, data[1:]
    path = folder / "x.jsonl"
    path.write_bytes(raw)
    whole = _records(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "LONG", 16)
        patch.setattr(long_text, "LONG_STRING", 8)
        patch.setattr(long_text, "READ_BYTES", block)
        chunks = _records(path)
    assert whole == chunks
    without_mark = raw.removeprefix(b"\xef\xbb\xbf")
    assert len(whole) == sum(not line.isspace() for line in without_mark.split(b"\n") if line)


def packed(folder: Path, data: bytes) -> None:
    """The first byte says the form, the others are the file: the lines are those that the library alone unpacks,
    wherever no fault is reported."""
    form, raw = ENDINGS[data[0] % len(ENDINGS)] if data else ".gz", data[1:]
    path = folder / f"x.jsonl{form}"
    path.write_bytes(raw)
    found = list(
        readers.read_records(Slice(str(path), 0, len(raw)), field_extractor("text"), None, Limits(8 * MB, 8 * MB))
    )
    if any(record.problem.startswith(("file ends", "damaged", "garbage", "window")) for record in found):
        return
    if b"\0" + MAGIC[form] in raw:
        return  # zeros between members, which the standard library takes for the end
    bare = raw.rstrip(b"\0")
    tails = (raw, bare + bytes(min(8, len(raw) - len(bare))), bare)  # some zeros may end a member
    whole = [content for tail in tails if (content := unpacked(form, tail)) is not None]
    assert whole, "no library unpacks it"
    plain = folder / "x.jsonl"
    plain.write_bytes(whole[0])
    assert [(r.text, r.problem) for r in found] == [
        (r.text, r.problem) for r in readers.read_records(Slice(str(plain), 0, len(whole[0])), field_extractor("text"))
    ]


def unpacked(form: str, raw: bytes) -> bytes | None:
    """By the standard library, or zstandard; None where it refuses, as most do the zeros of a tape."""
    try:
        match form:
            case ".gz":
                return gzip.decompress(raw)
            case ".bz2":
                return bz2.decompress(raw)
            case ".xz":
                return lzma.decompress(raw, lzma.FORMAT_XZ)
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as file:
            return file.read()
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError):
        return None


def text(folder: Path, data: bytes) -> None:
    """The first byte is the size of blocks, the others are a text file: as a whole and in blocks it reads the same."""
    block, raw = data[:1][0] + 1 if data else 1, data[1:]
    path = folder / "x.txt"
    path.write_bytes(raw)
    whole = _records(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "LONG", max(block, 4))
        patch.setattr(long_text, "READ_BYTES", block)
        try:
            chunks = _records(path)
        except long_text.BrokenText:
            chunks = [None]
    assert whole == chunks and len(whole) == 1


def table(folder: Path, data: bytes) -> None:
    """The first byte says the ending, the others are a table: rows, or what is wrong with it."""
    path = folder / f"x{TABLES[data[0] % len(TABLES)] if data else '.parquet'}"
    path.write_bytes(data[1:])
    for record in readers.read_records(Slice(str(path), 0, len(data)), field_extractor("text")):
        assert bool(record.text) != bool(record.problem)


def configuration(folder: Path, data: bytes) -> None:
    """A configuration's file, and the same text as the value of an override."""
    path = folder / "x.yaml"
    path.write_bytes(data)
    for attempt in (
        lambda: load_config(path),
        lambda: load_config(ROOT / "launch/configs/quickstart.yaml", ["name=" + data[:60].decode(errors="replace")]),
    ):
        _refused_or_done(attempt)


def state(folder: Path, data: bytes) -> None:
    """The first byte says which text of a checkpoint the others are; what opens one is tried."""
    path = _copy(folder)
    name = STATE_FILES[data[0] % len(STATE_FILES)] if data else INDEX
    (path / name).write_bytes(data[1:])
    _refused_or_done(lambda: incomplete(path))
    _refused_or_done(lambda: Progress(**read_metadata(path)["progress"]))
    _refused_or_done(lambda: _read_state(path, load_config(path / CONFIG).model if name == CONFIG else _model()))
    (path / name).write_bytes((checkpoint() / name).read_bytes())


def tensors(folder: Path, data: bytes) -> None:
    """A safetensors file whose header is the bytes: all that is read from one."""
    path, file = _copy(folder), "state/rank_00000.safetensors"
    whole = (checkpoint() / file).read_bytes()
    (path / file).write_bytes(data + whole[8 + int.from_bytes(whole[:8], "little") :])
    _refused_or_done(lambda: _read_state(path, _model()))


def beside(folder: Path, data: bytes) -> None:
    """The first byte says which of the files beside weights and data the others are."""
    names = list(BESIDE)
    name = names[data[0] % len(names)] if data else names[0]
    path = folder / name
    path.write_bytes(data[1:])
    prefix = str(folder / "x")
    attempts: dict[str, list[Callable[[], object]]] = {
        "SHA256SUMS": [lambda: read_sums(folder)],
        "calibration.json": [lambda: read_thresholds(folder), lambda: read_capacity(folder)],
        "state.json": [lambda: inputs.expand([str(folder)])],
        "log.jsonl": [lambda: last_validation(folder / "step_00000001", 9)],
        "tokenizer_config.json": [lambda: special_tokens._read(path), lambda: special_of(folder)],
        "model.safetensors.index.json": [lambda: weight_files(folder)],
        "config.json": [lambda: open_export(folder), lambda: read_settings(folder)],
        "x.json": [
            lambda: manifests.named_shards(prefix), lambda: manifests.manifest_of(prefix), lambda: tokenizer_of(prefix),
            lambda: find_pairs(prefix), lambda: added_ids([prefix]), lambda: manifest.read(prefix),
            lambda: manifest.forget(prefix + "-00001"),
        ],
        "recipe.yaml": [lambda: _extractor(load_recipe(str(path)))],
    }  # fmt: skip
    for attempt in attempts[name]:
        _refused_or_done(attempt)
    path.unlink(missing_ok=True)


def _extractor(recipe: Recipe) -> object:
    return template_extractor(recipe.template) if recipe.template else field_extractor(recipe.text_field)


def _refused_or_done(attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except UserError as error:
        assert "\n" not in str(error) or "^" in str(error), error  # which marks the position in a pattern


def _copy(folder: Path) -> Path:
    """The seed checkpoint in the target's folder, made at the first call."""
    path = folder / checkpoint().name
    if not path.exists():
        shutil.copytree(checkpoint(), path)
    return path


@cache
def _model() -> ModelConfig:
    return load_config(checkpoint() / CONFIG).model


def _read_state(path: Path, model: ModelConfig) -> None:
    reader = StateReader(path, model)
    for name in reader.table:
        reader.full(name, "exp_avg")
    for name in reader.buffers:
        reader.buffer(name)
    set_random_states(reader.random_states(0))


def _records(path: Path) -> list[str | None]:
    """The text of each record, None for those without."""
    found: list[str | None] = []
    for record in readers.read_records(Slice(str(path), 0, os.path.getsize(path)), field_extractor("text")):
        text = "".join(record.chunks) if record.chunks is not None else record.text
        found.append(text or None)
        assert bool(text) != bool(record.problem)
    return found
