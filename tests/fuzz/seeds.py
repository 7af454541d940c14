"""Valid inputs of every target, from which mutated ones are made."""

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
import zstandard

from megatron_taipan.checkpoint.folder import CONFIG, MANIFEST, METADATA
from megatron_taipan.checkpoint.reader import INDEX
from tests.checkpoints.made import memory_state, write_checkpoint

LINES = [
    b"\n".join(json.dumps(record, ensure_ascii=ascii).encode() for record in records)
    for ascii in (False, True)
    for records in (
        [{"text": 'a "quoted" \\ word \u00e9 \U0001f600', "n": [1, None, {"x": "y" * 30}]}, {"text": "b"}],
        [{"text": "long " * 20}, {"other": "x"}, [], "text", {"text": ""}],
    )
]
ENDINGS = (".gz", ".zst", ".bz2", ".xz")
TABLES = (".parquet", ".arrow")
STATE_FILES = (MANIFEST, METADATA, INDEX, CONFIG)
SUM = f"{'0' * 64}  model.safetensors\n"
MANIFEST_OF_DATA = {
    "format": "data_prep manifest 1", "documents": 2, "tokens": 9, "learned": 3,
    "shards": [{"prefix": "x", "documents": 2, "tokens": 9, "bin_xxh3_128": "0" * 32, "loss_mask": {"learned": 3}},
               {"prefix": "x-00001"}],
    "tokenizer": {"name": "t", "sha256": "0" * 64, "vocab_size": 100}, "options": {"bos": None, "eod": 2},
}  # fmt: skip
RECIPE = dict.fromkeys(("name", "source", "licence", "about", "verified", "renders", "text_field"), "x") | {
    "schema": {"x": "str"}, "example": {"x": "x"},
}  # fmt: skip
# the files beside weights and data, and a valid one of each
BESIDE: dict[str, Any] = {
    "SHA256SUMS": SUM,
    "calibration.json": {"capacity": 0.15, "thresholds": {"layers.1.gate.threshold": 1.5}},
    "state.json": {"_data_files": [{"filename": "a.arrow"}]},
    "log.jsonl": {"event": "valid", "step": 3, "ce": 1.5, "perplexity": 4.5, "tokens": 99, "gate1/selected": 0.2},
    "tokenizer_config.json": {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "add_bos_token": True},
    "model.safetensors.index.json": {"metadata": {"total_size": 5}, "weight_map": {"a": "model-00001.safetensors"}},
    "config.json": {"network": {"pattern": "M", "vocab_size": 64, "d_model": 32, "d_ff": 48}},
    "x.json": MANIFEST_OF_DATA,
    "recipe.yaml": yaml.safe_dump(RECIPE),
}


def pair(lengths: list[int], first: list[int], code: int = 8) -> bytes:
    """A valid pair in the form that the target takes."""
    offsets = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    idx = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(first))
    idx += struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(first)}q", *lengths, *offsets, *first)
    return (2 * sum(lengths)).to_bytes(2, "little") + idx


def _index() -> list[bytes]:
    return [pair([3, 0, 5], [0, 1, 2, 3]), pair([1, 1, 1, 1], [0, 0, 3, 4]), pair([], [0]), pair([9], [0, 1])]


def _lines() -> list[bytes]:
    return [bytes([size]) + lines for size in (0, 3, 9) for lines in LINES]


def _packed() -> list[bytes]:
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    blocks = b"".join(stream.compress(line) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for line in LINES)
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    forms = [
        [gzip.compress(LINES[0]), gzip.compress(LINES[1]) + gzip.compress(LINES[2])],
        [zstandard.compress(LINES[0]), blocks + stream.flush() + skipped + zstandard.compress(bytes(300_000))],
        [bz2.compress(LINES[0]), bz2.compress(LINES[1]) * 2],
        [lzma.compress(LINES[0]), lzma.compress(LINES[1]) * 2],
    ]
    return [bytes([number]) + raw for number, raws in enumerate(forms) for raw in raws]


def _text() -> list[bytes]:
    return [bytes([block]) + text for block in (0, 2) for text in ("é€😀 plain".encode() * 3, b"\xef\xbb\xbfx\n")]


def _table() -> list[bytes]:
    import pyarrow
    from pyarrow import feather, ipc, parquet

    table = pyarrow.table({"text": ["a", None, "é" * 40], "n": [[1], [], None]})
    parquets, files, streams, feathers = (io.BytesIO() for _ in range(4))
    parquet.write_table(table, parquets)
    with ipc.new_file(files, table.schema) as writer:
        writer.write_table(table)
    with ipc.new_stream(streams, table.schema) as writer:
        writer.write_table(table)
    feather.write_feather(table, feathers)
    return [b"\0" + parquets.getvalue(), *(b"\1" + made.getvalue() for made in (files, streams, feathers))]


def _configuration() -> list[bytes]:
    tree = memory_state().config.model_dump(mode="json")
    short = {name: tree[name] for name in ("name", "model", "data", "train", "checkpoint")}
    text = yaml.safe_dump(short).encode()
    return [text, b"a: &a [1]\nb: [*a, *a]\nmodel: {pattern: M S, gate: {tau: {start: 2, end: 1, until: 9}}}\n"]


@cache
def checkpoint() -> Path:
    """A small checkpoint, made once a process."""
    state = memory_state("M S")
    return write_checkpoint(Path(tempfile.mkdtemp(prefix="fuzz_")), state.config, state.load)


def _state() -> list[bytes]:
    return [bytes([number]) + (checkpoint() / name).read_bytes() for number, name in enumerate(STATE_FILES)]


def _tensors() -> list[bytes]:
    whole = (checkpoint() / "state" / "rank_00000.safetensors").read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    return [whole[:size]]  # the target puts the values behind it


def _beside() -> list[bytes]:
    texts = [made if isinstance(made, str) else json.dumps(made) for made in BESIDE.values()]
    return [bytes([number]) + text.encode() for number, text in enumerate(texts)]


MAKERS: dict[str, Callable[[], list[bytes]]] = {
    "index": _index, "lines": _lines, "packed": _packed, "text": _text, "table": _table,
    "configuration": _configuration, "state": _state, "tensors": _tensors, "beside": _beside,
}  # fmt: skip


@cache
def seeds(name: str) -> tuple[bytes, ...]:
    return tuple(MAKERS[name]())


# ---- mutation ----

BITS = [
    b"\\",
    b'"',
    b"\n",
    b"\\u",
    b"\xff" * 8,
    bytes(8),
    b"*a",
    b"&a",
    b"../",
    b"[",
    b"{",
    b"]",
    b"1e999",
    b"-1",
    b"\0",
]
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, 1e308, 1.5, float("nan"), float("inf"), "", "x", "../x", "..", "/etc",
    "a\0b", "\ud800", "x" * 300, [], {}, [[]], [None], {"a": 1}, [1, 2, 3], "0", "M", "rank_00000.safetensors",
]  # fmt: skip


def mutated(name: str, rng: random.Random) -> bytes:
    """A seed with something else in it: at the level of bytes, or of the values of its JSON."""
    raw = rng.choice(seeds(name))
    if name in ("state", "beside", "lines") and rng.random() < 0.6:
        first, text = raw[:1], raw[1:]
        try:
            value = json.loads(text)
        except ValueError:
            pass
        else:
            for _ in range(rng.randint(1, 3)):
                value = _with_odd_value(value, rng)
            return first + json.dumps(value).encode()
    out = bytearray(raw)
    for _ in range(rng.randint(0, 4)):
        at = rng.randint(0, len(out))
        match rng.randrange(5):
            case 0:
                out[at : at + rng.randint(0, 3)] = rng.choice(BITS)
            case 1:
                out[at : at + rng.randint(0, 8)] = rng.randbytes(rng.randint(0, 4))
            case 2 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 3:
                other = rng.choice(seeds(name))
                begin = rng.randint(0, len(other))
                out[at:at] = other[begin : begin + rng.randint(0, 40)]
            case 4:
                del out[at : at + rng.randint(0, 1 + len(out) // 2)]
    return bytes(out)


def _with_odd_value(value: Any, rng: random.Random) -> Any:
    """The value, or one somewhere in it, replaced, left out or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        match rng.randrange(6):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value + [value[at]]
        return value[:at] + [_with_odd_value(value[at], rng)] + value[at + 1 :]
    key = rng.choice(list(value))
    match rng.randrange(8):
        case 0:
            return {k: v for k, v in value.items() if k != key}
        case 1:
            return value | {str(rng.choice(ODD)): value[key]}
    return value | {key: _with_odd_value(value[key], rng)}
