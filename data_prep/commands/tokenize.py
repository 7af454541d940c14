"""Turn text into Megatron's .bin/.idx, with several processes, restartably: a run that was killed at any instant is
continued by the same command, and its output is the same byte for byte."""

import argparse
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import orjson

from data_prep import corpora, fast, inputs, manifest, remote
from data_prep.extract import add_text_arguments, extractor, marks_learned, text_options
from data_prep.hashing import hash_file
from data_prep.job import Job
from data_prep.join import Joiner
from data_prep.kinds.registry import known_endings
from data_prep.limits import DEFAULT_LIMITS, add_limit_arguments, limits_of
from data_prep.parts import finished_part, make_part
from data_prep.pool import Pool
from data_prep.prefetch_tokenizer import PrefetchedTokenizer
from data_prep.progress import ProgressLine
from data_prep.readers import size_of
from data_prep.stream_cache import cache_stream, is_stream
from megatron_taipan.data import loss_mask
from megatron_taipan.data.indexed import token_dtype
from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.base import Tokenizer
from megatron_taipan.tokenizer.files import tokenizer_file
from megatron_taipan.tokenizer.load import load_tokenizer
from megatron_taipan.tokenizer.special_tokens import END_TOKENS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        help=f"files, folders or globs ({known_endings()}; a folder that Hugging Face datasets saved); - for JSON lines"
        " from stdin; hub:NAME[:CONFIG[:SPLIT]] for a hub dataset; s3://, gs://, hf://, https:// addresses; default:"
        " the source of --recipe",
    )
    parser.add_argument("--output", required=True, help="prefix of the result: PREFIX.bin, PREFIX.idx, PREFIX.json")
    parser.add_argument(
        "--tokenizer", required=True, help=".model, tokenizer.json, a folder, a hub name, or tiktoken:NAME"
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--allow-evaluation-data",
        action="store_true",
        help="make training text of a dataset that models are measured on",
    )
    add_limit_arguments(parser)
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--prepend-bos", action="store_true", help="begin each document with the begin token")
    parser.add_argument("--eod-token", help="spelling of the end-of-document token, where the tokenizer does not say")
    parser.add_argument("--bos-token", help="spelling of the begin token, where the tokenizer does not say")
    parser.add_argument(
        "--allow-special", action="store_true", help="let text that spells a special token become its id"
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip", "quarantine"),
        default="fail",
        help="a record that gives no document: stop; or leave it out and list it in PREFIX.skipped.jsonl (quarantine:"
        " with its content)",
    )
    parser.add_argument(
        "--shard-tokens", type=int, help="start another shard (PREFIX-00000, ...) after this many tokens"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "reference"),
        default="auto",
        help="auto: a fast tokenizer library where it proves equal to the reference on this corpus; reference: never",
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that was made from something else")


def run(args: argparse.Namespace) -> None:
    """Plans, tokenizes and joins, and writes the manifest last."""
    started = time.monotonic()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1 is needed")
    if args.shard_tokens is not None and args.shard_tokens < 1:
        raise UserError(f"--shard-tokens {args.shard_tokens}: at least 1 is needed")
    args.input = corpora.inputs_of(args)
    corpora.refuse_evaluation_data(args)
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    with _lock(args.output + ".work"):
        _run(args, started)


def _run(args: argparse.Namespace, started: float) -> None:
    """The run, alone on its output."""
    spooled = args.output + ".spool"
    remotes = {name: remote.find(name, spooled) for name in args.input if remote.is_remote(name)}
    sources = {path: source for found in remotes.values() for path, source in found.items()}
    files = inputs.expand(
        [cache_stream(name, spooled) if is_stream(name) else name for name in args.input],
        {name: list(found) for name, found in remotes.items()},
    )
    sizes = [(path, sources[path].bytes if path in sources else size_of(path)) for path in files]
    if not sum(size for _, size in sizes):
        raise UserError(f"the input is empty: {len(files)} file(s) with 0 bytes, the first is {files[0]}")
    wants_fast = args.backend == "auto" and not args.allow_special
    ahead = getattr(args, "ahead", None)
    if wants_fast and args.tokenizer.endswith(".json") and (ahead is None or ahead.path != args.tokenizer):
        ahead = PrefetchedTokenizer(args.tokenizer)
    try:
        tokenizer = load_tokenizer(args.tokenizer, args.allow_special)
    finally:
        loaded = ahead.result() if ahead else None
    bos = _special(tokenizer, "bos", args.prepend_bos, args.bos_token)
    eod = _special(tokenizer, "eod", args.append_eod, args.eod_token)
    print(f"each document begins with {_added(bos)} and ends with {_added(eod)}")
    job = Job(
        units=inputs.work_units(sizes),
        work=args.output + ".work",
        tokenizer=tokenizer,
        extract=extractor(args),
        dtype=token_dtype(tokenizer.vocab_size),
        bos=None if bos is None else bos["id"],
        eod=None if eod is None else eod["id"],
        on_error=args.on_error,
        allow_special=args.allow_special,
        marked=marks_learned(args),
        limits=limits_of(args),
    )
    options = {
        **text_options(args),
        "bos": job.bos,
        "eod": job.eod,
        "allow_special": args.allow_special,
        "on_error": args.on_error,
        "shard_tokens": args.shard_tokens,
        **(
            {} if job.limits == DEFAULT_LIMITS else {"limits": asdict(job.limits)}
        ),  # outputs of before had the usual ones
    }
    identity = _identity(sizes, tokenizer, options, spooled, sources)
    before = manifest.read(args.output)
    if before is not None and before.get("identity") == identity and manifest.present(args.output, before):
        for folder in (job.work, spooled):  # a run killed while it cleaned up
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{args.output} is complete already: {before['documents']} documents, {before['tokens']} tokens")
        return
    if before is None and os.path.exists(args.output + ".idx") and not os.path.exists(job.work):
        before = {}
    if before is not None and before.get("identity") != identity and not args.overwrite:
        raise UserError(
            f"{args.output} exists and was made from other inputs, options or another tokenizer; choose another"
            " --output, or give --overwrite"
        )
    _claim(job.work, identity)
    remote.fetch(sources)
    fast_backend = _fast_backend_of(job, args.tokenizer, loaded) if wants_fast else None
    plan = _Plan(job, fast_backend, args.workers)
    with plan.pool() as pool:
        job = plan.with_fastest(pool)
        ready = time.monotonic()
        with Joiner(job, args.output, args.shard_tokens) as joiner:
            notes = plan.make_parts(pool, joiner)
            encoded = time.monotonic()
            added = {"bos": bos, "eod": eod}
            _finish(job, notes, joiner, args, files, sizes, options, identity, added, started, sources)
    print(
        f"of this {ready - started:.2f} s to load and prove the tokenizer, {encoded - ready:.2f} s to tokenize,"
        f" {time.monotonic() - encoded:.2f} s to end"
    )


def _fast_backend_of(job: Job, name: str, loaded) -> Tokenizer | None:
    """The job's tokenizer in a faster library, not yet proved to give the same ids; None where there is none."""
    path = name if name.startswith("tiktoken:") else tokenizer_file(name)
    try:
        return fast.fast_backend_of(job.tokenizer, path, loaded)
    except ValueError as why:
        print(f"{job.tokenizer.library} tokenizes; no faster library: {why}")
        return None


class _Plan:
    """The parts that are to be made, and what workers do for them.

    Args:
        job: with the reference tokenizer.
        fast_backend: a faster one, used where it proves equal.
    """

    def __init__(self, job: Job, fast_backend: Tokenizer | None, workers: int):
        self.job, self.fast_backend = job, fast_backend
        self.notes = {number: note for number in range(len(job.units)) if (note := finished_part(job, number))}
        self.missing = [number for number in range(len(job.units)) if number not in self.notes]
        self.workers = min(workers, max(1, len(self.missing)))
        self.weights = [sum(part.stop - part.start for part in unit) for unit in job.units]
        self.progress = ProgressLine(sum(self.weights[number] for number in self.missing), len(job.units))

    def pool(self) -> Pool:
        """The workers; nothing that they inherit has encoded a text yet."""
        kinds: dict[str, Callable[[int], object]] = {"make": self._maker(self.job)}
        if self.fast_backend is not None:
            job, fast_backend = self.job, self.fast_backend
            texts = list(fast.sample(job.units, job.extract, job.work, job.limits))
            kinds["compare"] = lambda share: fast.difference(job.tokenizer, fast_backend, texts[share :: self.workers])
            kinds["make fast"] = self._maker(replace(self.job, tokenizer=fast_backend))
        return Pool(self.workers, kinds)

    def _maker(self, job: Job) -> Callable[[int], dict]:
        return lambda number: make_part(replace(job, report=self.progress.adder(number)), number)

    def with_fastest(self, pool: Pool) -> Job:
        """The job with the fast backend if it gives the same ids on samples of this corpus, else as it is."""
        if self.fast_backend is None:
            return self.job
        found = [why for _, why in pool.run("compare", list(range(self.workers))) if why]
        if found:
            print(f"{self.job.tokenizer.library} tokenizes; the faster fastokens is not used: {found[0]}")
            self.fast_backend = None
            return self.job
        return replace(self.job, tokenizer=self.fast_backend)

    def make_parts(self, pool: Pool, joiner: Joiner) -> list[dict]:
        """Notes of all parts, in order, each given to the joiner; parts that an earlier run finished are taken over."""
        if self.notes:
            print(f"continuing: {len(self.notes)} of {len(self.job.units)} parts are done")
        for number in self.notes:
            joiner.add(number)
        for number, note in pool.run("make fast" if self.fast_backend else "make", self.missing, self.progress.show):
            self.notes[number] = note
            self.progress.finished_input += self.weights[number]
            joiner.add(number)
        self.progress.clear()
        return [self.notes[number] for number in range(len(self.job.units))]


def _finish(job, notes, joiner, args, files, sizes, options, identity, added, started, sources) -> None:
    """Names the shards, writes the manifest, reports."""
    documents, tokens, text = (sum(note[key] for note in notes) for key in ("documents", "tokens", "text_bytes"))
    problems: dict[str, int] = {}
    for note in notes:
        for reason, count in note["problems"].items():
            problems[reason] = problems.get(reason, 0) + count
    if not documents:
        why = "; ".join(f"{count} x {reason}" for reason, count in problems.items()) or "blank lines only"
        shutil.rmtree(job.work)
        raise UserError(f"the input holds no document ({why}); nothing was written")
    shards = joiner.finish()
    manifest.remove(args.output)  # and the shards it names: it is never beside others
    joiner.commit()
    skipped = args.output + ".skipped.jsonl"
    if problems:
        parts = [job.part(number) for number, note in enumerate(notes) if ".skipped" in note["hashes"]]
        manifest.concatenate([part + ".skipped" for part in parts], skipped)
    else:
        Path(skipped).unlink(missing_ok=True)
    content = manifest.describe(
        job, notes, shards, sizes, options, identity, args.tokenizer, added, problems, documents, tokens, text
    )
    for entry in content["inputs"]:
        if source := sources.get(entry["path"]):  # by its address, and not where it was fetched to
            entry |= {"path": source.url, "etag": source.etag}
    manifest.write(args.output, content)
    shutil.rmtree(job.work)
    shutil.rmtree(args.output + ".spool", ignore_errors=True)
    seconds = time.monotonic() - started
    print(
        f"{args.output}: {documents} documents, {tokens} tokens ({job.dtype}, {len(shards)} shard(s)) from {len(files)}"
        f" file(s), {text / 1e6:.1f} MB of text, {seconds:.1f} s, {text / seconds / 1e6:.1f} MB/s,"
        f" {job.tokenizer.library}"
    )
    if job.marked:
        learned, apart = (sum(note[key] for note in notes) for key in ("learned", "apart"))
        print(
            f"{args.output}{loss_mask.SUFFIX}: {learned} of the tokens are learned"
            + (f"; in {apart} documents the prompt ends within a token: the answer is tokenized apart" if apart else "")
        )
    if problems:
        print(f"left out {sum(problems.values())} records, listed in {skipped}:")
        for reason, count in sorted(problems.items(), key=lambda item: -item[1]):
            print(f"  {count:10d}  {reason}")


def _special(tokenizer: Tokenizer, role: str, wanted: bool, spelling: str | None) -> dict | None:
    """`id`, `token` and `said` (by whom) of BOS or EOD if it is wanted."""
    if not wanted:
        return None
    flag = "--append-eod" if role == "eod" else "--prepend-bos"
    if spelling is not None:
        index = tokenizer.token_id(spelling)
        if index is None:
            raise UserError(f"{flag}: the tokenizer has no token {spelling!r}; give another with --{role}-token")
        return {"id": index, "token": spelling, "said": f"--{role}-token"}
    found = tokenizer.roles[END_TOKENS[role]]
    if found.id is None:
        raise UserError(f"{flag}: {found.said}; give the spelling of the right token with --{role}-token")
    return {"id": found.id, "token": found.candidates[found.id], "said": found.said}


def _added(special: dict | None) -> str:
    """BOS or EOD, for a message."""
    return "nothing added" if special is None else f"{special['token']!r}, id {special['id']} ({special['said']})"


def _identity(
    sizes: list[tuple[str, int]],
    tokenizer: Tokenizer,
    options: dict,
    spooled: str,
    sources: dict[str, remote.RemoteFile],
) -> str:
    """What must be equal for parts of an earlier run to be taken over. A remote file is known by address, size and tag,
    one that `cache_stream` has just written by its content, any other by path, size and time of its last change."""

    def known(path: str, size: int) -> tuple[str, int, str | int]:
        if path in sources:
            return sources[path].url, size, sources[path].etag
        if os.path.dirname(path) == spooled:
            return os.path.basename(path), size, hash_file(path)
        return os.path.abspath(path), size, _changed(path)

    files = [known(path, size) for path, size in sizes]
    return sha256(orjson.dumps([files, tokenizer.digest, options], option=orjson.OPT_SORT_KEYS)).hexdigest()


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


@contextmanager
def _lock(work: str) -> Iterator[None]:
    """No other run touches the output, its work folder or its spool meanwhile."""
    if not os.access(os.path.dirname(os.path.abspath(work)), os.W_OK):
        yield  # the folder is read-only; an output that is complete is still reported
        return
    with open(work + ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {work}; wait for it or end it") from error
        except OSError as error:  # some network file systems have no locks
            print(
                f"{work}.lock cannot be locked ({error.strerror}); see to it that no other run writes to this output",
                file=sys.stderr,
            )
        try:
            yield
        finally:
            os.unlink(file.name)


def _claim(work: str, identity: str) -> None:
    """Makes the work folder, and empties one that belongs to another identity."""
    os.makedirs(work, exist_ok=True)
    note = Path(work, "identity")
    if not note.exists() or note.read_text(encoding="utf-8") != identity:
        shutil.rmtree(work)
        os.makedirs(work)
        note.with_suffix(".partial").write_text(identity, encoding="utf-8")
        os.replace(note.with_suffix(".partial"), note)
