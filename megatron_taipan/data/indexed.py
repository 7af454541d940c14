"""Tokenized documents on disk: Megatron's .bin/.idx pair, read through a memory map and written atomically.

The .idx file, little endian, S sequences, D documents:

    9 bytes      b"MMIDIDX\\0\\0"
    uint64       version, 1
    uint8        code of the token type (DTYPES)
    uint64       S
    uint64       D + 1
    int32[S]     tokens in each sequence
    int64[S]     byte offset of each sequence in the .bin
    int64[D+1]   first sequence of each document, from 0 to S
    int8[S]      modes, in multimodal files only

The .bin file is the tokens back to back. Source of the format: Megatron-LM, core/datasets/indexed_dataset.py.
"""

import errno
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from megatron_taipan.data.handles import allow_more_files
from megatron_taipan.errors import UserError

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
UINT16_BELOW = 65_500  # Megatron's rule: a smaller vocabulary is stored as uint16, any other as int32
MAX_SEQUENCE = 2**31 - 1  # the .idx holds lengths as int32
CHUNK = 1 << 19  # index entries handled at a time, so that memory does not grow with the corpus


def token_dtype(vocab_size: int) -> np.dtype:
    """The type in which ids below `vocab_size` are stored."""
    return np.dtype(np.uint16 if vocab_size < UINT16_BELOW else np.int32)


class IndexedReader:
    """Random access to the documents of one .bin/.idx pair.

    Opening reads the index once, in chunks, to check it, and keeps nothing of it in memory. Tokens are read with
    `pread`: a .bin that shrinks under a running job gives an error, where a memory map would kill the process.

    Attributes:
        n_documents, n_sequences, n_tokens: counts.
        dtype: numpy type of the stored ids.
        fingerprint: hash of the index, the size of the .bin and 16 blocks of 4,096 bytes of it; a token that changes
            between them is not seen (checksums.py sees it).
        loss_mask: a pair that says which tokens are learned, or None; set by loss_mask.py.

    Raises:
        UserError: a file is missing, foreign, truncated, or index and .bin disagree.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        self.loss_mask: IndexedReader | None = None
        try:
            self._open()
            self._check()
        except OSError as error:
            more = "; allow more open files, `ulimit -n`, or use fewer shards" if error.errno == errno.EMFILE else ""
            raise UserError(f"cannot read {error.filename or self.prefix}: {error.strerror}{more}") from error

    def _open(self) -> None:
        """Maps the index and reads its header; refuses sizes that the file cannot hold before using them."""
        idx, bin = self.prefix + ".idx", self.prefix + ".bin"
        self._bin_fd = -1
        for path in (idx, bin):
            if not os.path.isfile(path):
                raise UserError(
                    f"{path} does not exist; make it with `python -m data_prep tokenize --output {self.prefix}`"
                )
        with open(idx, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEADER.size:
                raise UserError(f"{idx} is not a token index: {size} bytes, and the header alone has {HEADER.size}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bin_fd = os.open(bin, os.O_RDONLY | os.O_CLOEXEC)
        allow_more_files(self._bin_fd)
        magic, version, code, sequences, document_entries = HEADER.unpack_from(self._map)
        if magic != MAGIC:
            raise UserError(f"{idx} is not a token index: it starts with {magic!r}, not {MAGIC!r}")
        if version != 1:
            raise UserError(f"{idx} has version {version} of the index format; this program reads version 1")
        dtype = np.dtype(DTYPES.get(code, np.float64))
        if dtype.kind == "f":
            known = ", ".join(f"{c} {np.dtype(d)}" for c, d in DTYPES.items() if np.dtype(d).kind != "f")
            raise UserError(f"{idx} has token type code {code}; ids have one of {known}")
        needed = HEADER.size + 12 * sequences + 8 * document_entries
        if document_entries < 1 or size not in (needed, needed + sequences):
            raise UserError(
                f"{idx} is truncated or damaged: it claims {sequences} sequences and {document_entries - 1} documents,"
                f" which take {needed} bytes, and it has {size}; make it again"
            )
        self.dtype, self.n_sequences, self.n_documents = dtype, sequences, document_entries - 1
        self.bin_bytes = os.fstat(self._bin_fd).st_size
        self.n_tokens = self.bin_bytes // dtype.itemsize
        # memoryviews read single entries without making the array aligned first, which numpy would do by a full copy
        offsets = HEADER.size + 4 * sequences
        self._offsets = memoryview(self._map)[offsets : offsets + 8 * sequences].cast("q")
        self._first = memoryview(self._map)[offsets + 8 * sequences : needed].cast("q")

    def _check(self) -> None:
        """One pass over the index: lengths, offsets and documents must agree with each other and with the .bin."""
        idx = self.prefix + ".idx"
        digest = blake2b(
            HEADER.pack(MAGIC, 1, CODES[self.dtype], self.n_sequences, self.n_documents + 1), digest_size=16
        )
        expected = 0
        with open(idx, "rb", buffering=0) as file:
            offsets_at = HEADER.size + 4 * self.n_sequences
            for at in range(0, self.n_sequences, CHUNK):
                count = min(CHUNK, self.n_sequences - at)
                lengths = _entries(file, np.dtype("<i4"), HEADER.size + 4 * at, count)
                offsets = _entries(file, np.dtype("<i8"), offsets_at + 8 * at, count)
                if lengths.min() < 0:
                    bad = at + int(lengths.argmin())
                    raise UserError(f"{idx} is damaged: sequence {bad} has {lengths.min()} tokens; make it again")
                ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize + expected
                wrong = offsets != ends - lengths.astype(np.int64) * self.dtype.itemsize
                if wrong.any():
                    bad = int(wrong.argmax())
                    before = int(ends[bad - 1]) if bad else expected
                    raise UserError(
                        f"{idx} is damaged: sequence {at + bad} starts at byte {int(offsets[bad])}"
                        f", and the one before ends at byte {before}; make it again"
                    )
                expected = int(ends[-1])
                digest.update(lengths.data)
            if expected != self.bin_bytes:
                raise UserError(
                    f"{self.prefix}.bin has {self.bin_bytes} bytes and its index describes {expected}"
                    f" ({self.n_sequences} sequences of {self.dtype}); one of the two is truncated or foreign"
                )
            self._document_is_sequence = self.n_documents == self.n_sequences
            previous = 0
            for at in range(0, self.n_documents + 1, CHUNK):
                count = min(CHUNK, self.n_documents + 1 - at)
                first = _entries(file, np.dtype("<i8"), offsets_at + 8 * self.n_sequences + 8 * at, count)
                if first[0] < previous or (at == 0 and first[0] != 0) or (np.diff(first) < 0).any():
                    raise UserError(f"{idx} is damaged: its documents are not in rising order; make it again")
                if self._document_is_sequence and not np.array_equal(first, np.arange(at, at + count)):
                    self._document_is_sequence = False
                previous = int(first[-1])
                if not self._document_is_sequence:
                    digest.update(first.data)
        if previous != self.n_sequences:
            raise UserError(
                f"{idx} is damaged: its documents end at sequence {previous} of {self.n_sequences}; make it again"
            )
        digest.update(self.bin_bytes.to_bytes(8, "little"))
        for block in range(16):  # equal lengths with other tokens would otherwise look the same
            digest.update(os.pread(self._bin_fd, 4096, block * self.bin_bytes // 16))
        self.fingerprint = digest.hexdigest()

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        for opened in ("_map", "_bin_fd", "_offsets", "_first"):
            del state[opened]
        return state

    def __setstate__(self, state: dict) -> None:
        """Another process opens the files again and relies on the check that this object passed."""
        self.__dict__.update(state)
        self._open()

    def __del__(self) -> None:
        if getattr(self, "_bin_fd", -1) >= 0:
            os.close(self._bin_fd)
            self._bin_fd = -1

    def start(self, document: int) -> int:
        """Position of a document's first token in the .bin, in tokens; `start(n_documents)` is `n_tokens`."""
        sequence = document if self._document_is_sequence else self._first[document]
        return self.n_tokens if sequence == self.n_sequences else self._offsets[sequence] // self.dtype.itemsize

    def starts(self, documents: np.ndarray) -> np.ndarray:
        """`start` of many documents: int64 [n] -> int64 [n]."""
        if not self._document_is_sequence:
            documents = np.frombuffer(self._first, "<i8")[documents]
        inside = documents < self.n_sequences
        if not self.n_sequences:
            return np.zeros(len(documents), np.int64)
        offsets = np.frombuffer(self._offsets, "<i8")[np.where(inside, documents, 0)]
        return np.where(inside, offsets // self.dtype.itemsize, self.n_tokens)

    def find(self, position: int) -> int:
        """The document that holds the token at `position`."""
        if self._document_is_sequence:
            return bisect_right(self._offsets, position * self.dtype.itemsize) - 1
        return bisect_right(range(self.n_documents), position, key=self.start) - 1

    def where(self, position: int) -> tuple[str, int, int]:
        """For messages: the prefix of a token's pair, its number in that .bin and its document's number there."""
        return self.prefix, position, self.find(position)

    def boundaries(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions at which a document begins, in each of n spans [start, stop) of tokens, int64 [n].

        Returns:
            the positions, rising within a span, int64 [k], and the number of the span of each, int64 [k].
        """
        first, last = self._first_from(np.concatenate([start, stop])).reshape(2, -1)
        counts = np.maximum(last - first, 0)
        span = np.repeat(np.arange(len(counts)), counts)
        found = self.starts(np.arange(len(span)) + np.repeat(first - (np.cumsum(counts) - counts), counts))
        # an empty document begins where the next one does
        kept = np.ones(len(found), bool)
        kept[1:] = (found[1:] != found[:-1]) | (span[1:] != span[:-1])
        return (found, span) if kept.all() else (found[kept], span[kept])

    def _first_from(self, positions: np.ndarray) -> np.ndarray:
        """The first document that starts at or after each position in [0, n_tokens]: int64 [n] -> int64 [n].

        One binary search for all of them at once; numpy's own would first copy the whole index to make it aligned.
        """
        low, high = np.zeros(len(positions), np.int64), np.full(len(positions), self.n_documents, np.int64)
        for _ in range(self.n_documents.bit_length()):
            middle = (low + high) >> 1
            before = self.starts(middle) < positions
            low = np.where(before, middle + 1, low)
            high = np.where(before, high, middle)
        return low

    def read_into(self, position: int, out: np.ndarray) -> None:
        """Fills `out` (contiguous, of type `dtype`) with the tokens from `position` on."""
        self.read_bytes(position, out.data.cast("B"))

    def read_bytes(self, position: int, out: memoryview) -> None:
        """Fills the bytes `out` with the tokens from `position` on, as the file holds them."""
        self.read_raw(position * self.dtype.itemsize, out)

    def read_raw(self, start: int, out: memoryview) -> None:
        """Fills the bytes `out` with those from byte `start` of the .bin on."""
        size = len(out)
        got = os.preadv(self._bin_fd, [out], start)
        while got < size:
            more = os.preadv(self._bin_fd, [out[got:]], start + got)
            if not more:
                raise UserError(f"{self.prefix}.bin became shorter while it was read; restore it and resume")
            got += more

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, [n]."""
        if not 0 <= index < self.n_documents:
            raise IndexError(f"document {index} of {self.n_documents}")
        out = np.empty(self.start(index + 1) - self.start(index), self.dtype)
        self.read_into(self.start(index), out)
        return out

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document, in chunks: int64 [<= CHUNK]."""
        for at in range(0, self.n_documents, CHUNK):
            yield np.diff(self.starts(np.arange(at, min(at + CHUNK, self.n_documents) + 1)))


class IndexedWriter:
    """Writes one .bin/.idx pair, one sequence a document; nothing has the final names before `finish`.

    As a context manager it finishes on success and removes its temporary files on an exception.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type):
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        self._bin = open(self.prefix + ".bin.partial", "wb")
        self._lengths = open(self.prefix + ".len.partial", "wb")

    def add_document(self, ids: np.ndarray | list[int]) -> None:
        """Appends a document.

        Raises:
            UserError: an id does not fit the token type, or the document has more than 2^31 - 1 tokens.
        """
        ids = np.asarray(ids)
        limits = np.iinfo(self.dtype)
        if len(ids) and (ids.min() < max(0, limits.min) or ids.max() > limits.max):
            raise UserError(
                f"id {ids.min() if ids.min() < 0 else ids.max()} does not fit {self.dtype} ({self.prefix}.bin)"
            )
        if len(ids) > MAX_SEQUENCE:
            raise UserError(f"a document of {len(ids)} tokens is longer than the format's {MAX_SEQUENCE}; split it")
        self._bin.write(ids.astype(self.dtype, copy=False).tobytes())
        self._lengths.write(struct.pack("<i", len(ids)))

    def finish(self) -> None:
        """Writes the index and gives both files their names, the index last: a pair with an index is complete."""
        self._lengths.close()
        sync_and_close(self._bin)
        write_index(self.prefix + ".idx.partial", self.dtype, self.prefix + ".len.partial")
        commit(self.prefix)
        os.unlink(self.prefix + ".len.partial")

    def abort(self) -> None:
        """Removes what was written."""
        self._bin.close()
        self._lengths.close()
        for ending in (".bin", ".idx", ".len"):
            Path(self.prefix + ending + ".partial").unlink(missing_ok=True)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()


def write_index(path: str | Path, dtype: np.dtype, lengths_path: str | Path) -> None:
    """Writes a synced .idx from a file of int32 document lengths, in chunks, one sequence a document."""
    count = os.path.getsize(lengths_path) // 4
    with open(lengths_path, "rb", buffering=0) as source, open(path, "wb") as out:
        out.write(HEADER.pack(MAGIC, 1, CODES[np.dtype(dtype)], count, count + 1))
        for at in range(0, count, CHUNK):
            out.write(_entries(source, np.dtype("<i4"), 4 * at, min(CHUNK, count - at)).data)
        end = 0
        for at in range(0, count, CHUNK):
            lengths = _entries(source, np.dtype("<i4"), 4 * at, min(CHUNK, count - at)).astype("<i8")
            ends = np.cumsum(lengths) * np.dtype(dtype).itemsize + end
            out.write((ends - lengths * np.dtype(dtype).itemsize).data)
            end = int(ends[-1])
        for at in range(0, count + 1, CHUNK):
            out.write(np.arange(at, min(at + CHUNK, count + 1), dtype="<i8").data)
        sync_and_close(out)


def commit(prefix: str) -> None:
    """Renames the synced `.partial` pair to its final names and syncs the folder."""
    Path(prefix + ".idx").unlink(missing_ok=True)  # never an old index beside a new .bin
    os.replace(prefix + ".bin.partial", prefix + ".bin")
    os.replace(prefix + ".idx.partial", prefix + ".idx")
    folder = os.open(os.path.dirname(os.path.abspath(prefix)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sync_and_close(file) -> None:
    """Flushes a file to the disk and closes it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _entries(file, dtype: np.dtype, at: int, count: int) -> np.ndarray:
    """`count` entries of an index file from byte `at`; a short read is an error, not a short array."""
    data = os.pread(file.fileno(), count * dtype.itemsize, at)
    if len(data) != count * dtype.itemsize:
        raise UserError(f"{file.name} became shorter while it was read: {len(data)} of {count * dtype.itemsize} bytes")
    return np.frombuffer(data, dtype)
