"""One unit of input becomes one part: tokens, document lengths, a loss mask if texts are marked, skipped records,
and a note that says it is whole.

A part counts as done when its note (NNN.json) exists and the hashes in it fit the files: the note is written last and
renamed into place, so a process killed at any instant leaves either a whole part or none.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson

from data_prep.hashing import HashedFile, hash_file, hash_slice
from data_prep.job import Job
from data_prep.kinds.records import Record
from data_prep.learned import encode_marked
from data_prep.long_text import BrokenText
from data_prep.readers import read_records
from data_prep.windows import encode_stream
from megatron_taipan.data.indexed import MAX_SEQUENCE
from megatron_taipan.errors import UserError

BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 19, 1024  # documents given to the tokenizer at a time


def make_part(job: Job, number: int) -> dict:
    """Tokenizes one unit.

    Returns:
        the note: counts of documents, tokens, text bytes, problems by reason, hashes.

    Raises:
        UserError: a record gives no document and the policy is to fail; a document cannot be stored.
    """
    path = job.part(number)
    part = _Part(job, path)
    try:
        for span in job.units[number]:
            for record in read_records(span, job.extract, job.work, job.limits):
                part.add(record)
        part.flush()
    finally:
        hashes = part.close()
    note = {
        **part.counts(),
        "hashes": hashes,
        "input": [hash_slice(s.path, s.start, s.stop) for s in job.units[number]],
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return note if whole else None


class _Part:
    """Collects documents into batches, tokenizes them, writes ids and lengths."""

    def __init__(self, job: Job, path: str):
        self.job, self.path = job, path
        self.tokens_file, self.lengths_file = HashedFile(path + ".bin"), HashedFile(path + ".len")
        self.mask_file = HashedFile(path + ".mask") if job.marked else None
        self.skipped_file: HashedFile | None = None  # most parts need none
        self.batch: list[Record] = []
        self.characters = 0
        self.documents = self.tokens = self.bytes = 0
        self.learned = self.apart = 0  # tokens that the mask marks; documents with a border within a token
        self.problems: dict[str, int] = {}

    def counts(self) -> dict:
        counts = {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.bytes}
        learned = {"learned": self.learned, "apart": self.apart} if self.job.marked else {}
        return {**counts, **learned, "problems": self.problems}

    def close(self) -> dict[str, str]:
        """The files' hashes by ending."""
        files = {
            ".bin": self.tokens_file,
            ".len": self.lengths_file,
            ".mask": self.mask_file,
            ".skipped": self.skipped_file,
        }
        return {ending: file.close() for ending, file in files.items() if file is not None}

    def add(self, record: Record) -> None:
        if record.problem:
            self._problem(record)
            return
        if self.job.marked and not record.borders:
            problem = "document without learned parts: plain text has no fields for a template"
            self._problem(Record(record.where, problem=problem, raw=record.raw or record.text.encode()))
            return
        if record.chunks is not None:
            self.flush()
            self._long(record)
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
        ids, counts, mask = self._encoded()
        without = _without_text(ids, counts, job.tokenizer.special if job.allow_special else {})
        unlearned = without if mask is None else without | has_none(mask, counts)
        if unlearned.any():
            for at in np.flatnonzero(unlearned):
                record = self.batch[at]
                why = "of special tokens only" if without[at] else "without learned tokens"
                why = f"document {why}" if counts[at] else "document without tokens"
                self._problem(Record(record.where, problem=why, raw=record.text.encode()))
            inside = ~np.repeat(unlearned, counts)
            ids, counts, mask = ids[inside], counts[~unlearned], None if mask is None else mask[inside]
        self._check_ids(self.batch[0].where, ids)
        if mask is not None:
            last = np.array([len(record.borders) % 2 for record in self.batch], np.uint8)[~unlearned]
            self._write_mask(mask, counts, last)
        out, counts = with_ends(ids, counts, job.bos, job.eod, job.dtype)
        if len(counts):
            self._check_length(self.batch[0].where, int(counts.max()))
        self.tokens_file.write(out.data)
        self.lengths_file.write(counts.astype("<i4").data)
        sizes = np.array([record.size for record in self.batch], np.int64)
        self.documents += len(counts)
        self.tokens += len(out)
        self.bytes += int(sizes[~unlearned].sum())
        job.report(int(sizes.sum()), len(out), len(counts))
        self.batch, self.characters = [], 0

    def _encoded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Ids of the batch, how many each document has, and which of them are learned, if texts say it."""
        texts = [record.text for record in self.batch]
        if not self.job.marked:
            return *self.job.tokenizer.encode_batch(texts), None
        borders = [record.borders for record in self.batch]
        ids, counts, mask, apart = encode_marked(self.job.tokenizer, texts, borders)
        self.apart += apart
        return ids, counts, mask

    def _write_mask(self, mask: np.ndarray, counts: np.ndarray, last: np.ndarray) -> None:
        """Writes what is learned of d documents: uint8 [n] of their text, and EOD where `last` [d] is, BOS never."""
        assert self.mask_file is not None
        bos, eod = (None if token is None else 0 for token in (self.job.bos, self.job.eod))
        out, ended = with_ends(mask, counts, bos, eod, np.uint8)
        if eod is not None:
            out[np.cumsum(ended) - 1] = last
        self.mask_file.write(out.data)
        self.learned += int(out.sum(dtype=np.int64))

    def _long(self, record: Record) -> None:
        """Tokenizes and writes one document in chunks; if it turns out to be broken, what was written is taken back."""
        assert record.chunks is not None
        job, begin, tokens, size = self.job, self.tokens_file.mark(), 0, 0

        def measured() -> Iterator[str]:
            nonlocal size
            for chunk in record.chunks or ():
                count = len(chunk) if chunk.isascii() else len(chunk.encode())
                size += count
                job.report(count, 0, 0)
                yield chunk

        problem = ""
        try:
            for ids in encode_stream(job.tokenizer, measured()):
                self._check_ids(record.where, ids)
                if not tokens and len(ids) and job.bos is not None:
                    self.tokens_file.write(np.array([job.bos], job.dtype).data)
                    tokens += 1
                self.tokens_file.write(ids.astype(job.dtype).data)
                tokens += len(ids)
                job.report(0, len(ids), 0)
        except (BrokenText, UnicodeEncodeError) as error:
            problem = str(error) if isinstance(error, BrokenText) else f"invalid UTF-8: {error.reason}"
        if problem or not tokens:
            self.tokens_file.go_back(begin)
            problem = problem or ("document without tokens" if size else "empty document")
            self._problem(Record(record.where, problem=problem, raw=record.raw))
            return
        if job.eod is not None:
            self.tokens_file.write(np.array([job.eod], job.dtype).data)
            tokens += 1
        self._check_length(record.where, tokens)
        self.lengths_file.write(np.array([tokens], "<i4").data)
        self.documents += 1
        self.tokens += tokens
        self.bytes += size
        job.report(0, 0, 1)

    def _check_ids(self, where: str, ids: np.ndarray) -> None:
        if len(ids) and (top := int(ids.max())) >= self.job.tokenizer.vocab_size:
            raise UserError(
                f"{where}: the tokenizer gave id {top}, beyond its vocabulary of {self.job.tokenizer.vocab_size}; the"
                " tokenizer file is damaged"
            )

    def _check_length(self, where: str, count: int) -> None:
        if count > MAX_SEQUENCE:
            raise UserError(f"{where}: a document of {count} tokens; the format holds {MAX_SEQUENCE}")

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
        if self.skipped_file is None:
            self.skipped_file = HashedFile(self.path + ".skipped")
        self.skipped_file.write(orjson.dumps(entry) + b"\n")


def _without_text(ids: np.ndarray, counts: np.ndarray, special: dict[int, str]) -> np.ndarray:
    """Which documents have no token (white space that the tokenizer drops) or none but special ones: bool [d]."""
    return has_none(~np.isin(ids, list(special)), counts) if special else counts == 0


def has_none(flags: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which documents have no token that is flagged: [n], int64 [d] -> bool [d]."""
    before = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    ends = np.cumsum(counts)
    return before[ends] == before[ends - counts]


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
