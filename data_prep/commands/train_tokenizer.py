"""Train a sentencepiece tokenizer on the same inputs that `tokenize` reads. Every byte sequence can be encoded and
decoded back (byte fallback, white space kept), so no text is lost to the tokenizer."""

import argparse
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep import inputs
from data_prep.extract import add_text_arguments, extractor
from data_prep.kinds.records import Slice
from data_prep.kinds.registry import known_endings
from data_prep.limits import add_limit_arguments, limits_of
from data_prep.long_text import BrokenText
from data_prep.readers import read_records, size_of
from megatron_taipan.data.indexed import sync_and_close
from megatron_taipan.errors import UserError

PRINTABLE = "".join(map(chr, range(33, 127)))  # always in the vocabulary: rare ones would cost a byte token each
LONGEST_LINE_CHARS = (
    2000  # characters given to the trainer at a time; by default it drops lines of more than 4192 bytes
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, help=f"files, folders or globs; kinds: {known_endings()}")
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens, special and byte tokens included")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: bpe")
    add_text_arguments(parser)
    add_limit_arguments(parser)
    parser.add_argument(
        "--max-bytes", type=int, default=1 << 30, help="stop reading after this much text (default: 2^30)"
    )
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="what to do with a broken record")


def run(args: argparse.Namespace) -> None:
    """Reads, trains, writes the model whole or not at all."""
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError("training takes the package sentencepiece; `pip install sentencepiece`") from error
    least = 256 + 3 + len(PRINTABLE) + 1
    if not least <= args.vocab_size < 1 << 20:
        raise UserError(
            f"--vocab-size {args.vocab_size}: it must be between {least} (256 bytes, 3 special tokens,"
            f" {len(PRINTABLE)} printable ASCII characters, the space) and {(1 << 20) - 1}"
        )
    files = inputs.expand(args.input)
    counts = {"documents": 0, "bytes": 0, "skipped": 0}
    model = io.BytesIO()
    # in a thread, since the library knows nothing of Ctrl-C; no `with`, which would wait for it to end
    thread = ThreadPoolExecutor(1)
    try:
        thread.submit(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=_lines(files, args, counts),
            model_writer=model,
            vocab_size=args.vocab_size,
            max_sentence_length=4 * LONGEST_LINE_CHARS,
            model_type=args.model_type,
            character_coverage=0.9995,
            required_chars=PRINTABLE,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=len(os.sched_getaffinity(0)),
            train_extremely_large_corpus=args.max_bytes > 4 << 30,
            minloglevel=2,
        ).result()
    except RuntimeError as error:
        if not counts["documents"]:
            raise UserError(
                f"the input holds no document ({len(files)} file(s), {counts['skipped']} broken records)"
            ) from error
        reason = " ".join(str(error).split()).rpartition(") ")[2] or str(error)
        raise UserError(
            f"sentencepiece cannot make --vocab-size {args.vocab_size} from {counts['documents']} documents"
            f" ({counts['bytes']} bytes): {reason}"
        ) from error
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    partial = Path(args.output + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(model.getvalue())
            sync_and_close(file)
        os.replace(partial, args.output)
    finally:
        partial.unlink(missing_ok=True)
    print(
        f"{args.output}: {args.model_type}, {args.vocab_size} tokens, from {counts['documents']} documents,"
        f" {counts['bytes'] / 1e6:.1f} MB"
        + (f", {counts['skipped']} broken records left out" if counts["skipped"] else "")
    )


def _lines(files: list[str], args: argparse.Namespace, counts: dict[str, int]) -> Iterator[str]:
    """The documents in lines that the trainer takes, cut at white space where they are too long."""
    extract, limits = extractor(args), limits_of(args)
    for path in files:
        for record in read_records(Slice(path, 0, size_of(path)), extract, limits=limits):
            if record.problem:
                if args.on_error == "fail":
                    raise UserError(f"{record.where}: {record.problem}; leave such records out with --on-error skip")
                counts["skipped"] += 1
                continue
            counts["documents"] += 1
            try:
                for text in record.chunks or (record.text,):
                    counts["bytes"] += len(text.encode())
                    yield from _cut(text)
                    if counts["bytes"] >= args.max_bytes:
                        return
            except BrokenText as error:  # in the middle of a long document; what came before it is used
                if args.on_error == "fail":
                    raise UserError(f"{record.where}: {error}; leave such records out with --on-error skip") from error
                counts["skipped"] += 1


def _cut(text: str) -> Iterator[str]:
    for line in text.splitlines():
        while len(line) > LONGEST_LINE_CHARS:
            at = line.rfind(" ", LONGEST_LINE_CHARS // 2, LONGEST_LINE_CHARS)
            at = LONGEST_LINE_CHARS if at < 0 else at
            yield line[:at]
            line = line[at:]
        if line:
            yield line
