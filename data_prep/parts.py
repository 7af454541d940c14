"""One piece of input becomes one part: tokens, document lengths, skipped records, and a note that says it is whole.

A part counts as done when its note (NNN.json) exists and the hashes in it fit the files: the note is written last and
renamed into place, so a process killed at any instant leaves either a whole part or none.
"""

import os
from pathlib import Path

import numpy as np
import orjson
import xxhash

from data_prep.job import Job
from data_prep.readers import Record, read
from megatron_taipan.data.indexed import MAX_SEQUENCE
from megatron_taipan.errors import UserError

BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 19, 1024  # documents given to the tokenizer at a time
HASH_BLOCK = 1 << 20


def make_part(job: Job, number: int) -> dict:
    """Tokenizes one piece.

    Returns:
        the note: counts of documents, tokens, text bytes, problems by reason, hashes.

    Raises:
        UserError: a record gives no document and the policy is to fail; a document cannot be stored.
    """
    path = job.part(number)
    with (
        open(path + ".bin", "wb") as tokens,
        open(path + ".len", "wb") as lengths,
        open(path + ".skipped", "wb") as skipped,
    ):
        part = _Part(job, tokens, lengths, skipped)
        for piece in job.pieces[number]:
            for record in read(piece, job.extract):
                part.add(record)
        part.flush()
    hashes = {ending: hash_file(path + ending) for ending in (".bin", ".len", ".skipped")}
    note = {
        **part.counts(),
        "hashes": hashes,
        "input": [hash_slice(s.path, s.start, s.stop) for s in job.pieces[number]],
    }
    Path(path + ".json.partial").write_bytes(orjson.dumps(note))
    os.replace(path + ".json.partial", path + ".json")
    return note


def finished_part(job: Job, number: int) -> dict | None:
    """The note of a part that an earlier run finished, if the files are what it says."""
    path = job.part(number)
    try:
        note = orjson.loads(Path(path + ".json").read_bytes())
        whole = all(hash_file(path + ending) == digest for ending, digest in note["hashes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return note if whole else None


class _Part:
    """Collects documents into batches, tokenizes them, writes ids and lengths."""

    def __init__(self, job: Job, tokens, lengths, skipped):
        self.job, self.tokens_file, self.lengths_file, self.skipped_file = job, tokens, lengths, skipped
        self.batch: list[Record] = []
        self.characters = 0
        self.documents = self.tokens = self.bytes = 0
        self.problems: dict[str, int] = {}

    def counts(self) -> dict:
        return {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.bytes, "problems": self.problems}

    def add(self, record: Record) -> None:
        if record.problem:
            self._problem(record)
            return
        self.batch.append(record)
        self.characters += len(record.text)
        if self.characters >= BATCH_CHARACTERS or len(self.batch) >= BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Tokenizes and writes what was collected."""
        if not self.batch:
            return
        job = self.job
        texts = [record.text for record in self.batch]
        ids, counts = job.tokenizer.encode(texts)
        if (counts == 0).any():  # white space that the tokenizer drops
            for record, count in zip(self.batch, counts, strict=True):
                if not count:
                    self._problem(Record(record.where, problem="document without tokens", raw=record.text.encode()))
            counts = counts[counts > 0]
        if len(ids) and (top := int(ids.max())) >= job.tokenizer.vocab_size:
            raise UserError(
                f"{self.batch[0].where}: the tokenizer gave id {top}, beyond its vocabulary of"
                f" {job.tokenizer.vocab_size}; the tokenizer file is damaged"
            )
        out, counts = with_ends(ids, counts, job.bos, job.eod, job.dtype)
        if len(counts) and int(counts.max()) > MAX_SEQUENCE:
            raise UserError(
                f"{self.batch[0].where}: a document of {int(counts.max())} tokens; the format holds {MAX_SEQUENCE}"
            )
        self.tokens_file.write(out.data)
        self.lengths_file.write(counts.astype("<i4").data)
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        self.documents += len(counts)
        self.tokens += len(out)
        self.bytes += size
        job.report(size, len(out), len(counts))
        self.batch, self.characters = [], 0

    def _problem(self, record: Record) -> None:
        """Counts a record that gives no document and notes it, with its content if it goes to quarantine."""
        if self.job.on_error == "fail":
            raise UserError(
                f"{record.where}: {record.problem}; repair the input, or leave such records out with --on-error skip"
                " (or quarantine, which keeps them in a file)"
            )
        kind = record.problem.partition(":")[0]
        kind = kind.partition(" at byte ")[0]
        self.problems[kind] = self.problems.get(kind, 0) + 1
        entry = {"where": record.where, "reason": record.problem}
        if self.job.on_error == "quarantine":
            entry["raw"] = record.raw.decode("utf-8", "backslashreplace")
        self.skipped_file.write(orjson.dumps(entry) + b"\n")


def with_ends(
    ids: np.ndarray, counts: np.ndarray, bos: int | None, eod: int | None, dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Puts BOS before and EOD after each document: ids [n], counts [d] -> ids [n + d * added], counts [d]."""
    added = (bos is not None) + (eod is not None)
    if not added:
        return ids.astype(dtype), counts
    counts = counts + added
    ends = np.cumsum(counts)
    out = np.empty(int(ends[-1]) if len(ends) else 0, dtype)
    inner = np.ones(len(out), bool)
    if bos is not None:
        out[ends - counts] = bos
        inner[ends - counts] = False
    if eod is not None:
        out[ends - 1] = eod
        inner[ends - 1] = False
    out[inner] = ids
    return out, counts


def hash_file(path: str) -> str:
    """xxh3-128 of a file: a checksum against damage, not against forgery."""
    return hash_slice(path, 0, os.path.getsize(path))


def hash_slice(path: str, start: int, stop: int) -> str:
    """xxh3-128 of bytes [start, stop) of a file; of one that cannot be read, the empty string."""
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while start < stop and (block := file.read(min(HASH_BLOCK, stop - start))):
                digest.update(block)
                start += len(block)
    except OSError:
        return ""
    return digest.hexdigest()
