"""The command line: one subcommand a file of data_prep/commands."""

import argparse
import errno
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module

from data_prep.prefetch_tokenizer import PrefetchedTokenizer, guess
from megatron_taipan.errors import UserError, refuse_other_encodings
from megatron_taipan.programs import exits_cleanly

COMMANDS = {
    "tokenize": "turn text into .bin/.idx",
    "recipes": "list the corpora that --recipe knows, with licence, size and purpose",
    "train-tokenizer": "train a sentencepiece tokenizer",
    "merge": "put several .bin/.idx pairs into one",
    "split": "cut a pair into shards, or into training and validation documents",
    "dedup": "drop documents that repeat an earlier one",
    "verify": "re-read everything and check it",
    "stats": "lengths, token frequencies, bytes per token",
    "inspect": "print documents decoded, special tokens visible, and a histogram of lengths",
}


@exits_cleanly
def main(argv: list[str] | None = None) -> int | None:
    """Runs a subcommand; each module has `add_arguments(parser)` and `run(args)`."""
    given = sys.argv[1:] if argv is None else argv
    ahead = guess(given)
    try:
        return _run(given, ahead)
    finally:
        if ahead:
            ahead.result()


def program() -> None:
    """`main` as a separate process; it ends at once, since taking tokenizers apart would cost 0.05 s."""
    try:
        status = main()
    except KeyboardInterrupt:
        continues = "; the same command continues" if sys.argv[1:2] == ["tokenize"] else ""
        print(f"stopped by Ctrl-C{continues}", file=sys.stderr)
        status = 128 + signal.SIGINT
    with suppress(OSError):  # what does not fit on a full disk is lost, the status is not
        sys.stderr.flush()
    os._exit(status)


def _run(given: list[str], ahead: PrefetchedTokenizer | None) -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Text to .bin/.idx, and what is done with such pairs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = {given[0]: COMMANDS[given[0]]} if given and given[0] in COMMANDS else COMMANDS  # imports just that
    for name, summary in chosen.items():
        module = import_module(f"data_prep.commands.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(given)
    args.ahead = ahead
    from megatron_taipan.data import loss_mask  # not at the top: it takes time, and the tokenizer is read meanwhile

    output = getattr(args, "output", None)
    if output is not None and not os.path.basename(output):
        raise UserError(f"--output {output!r} ends without a name; add one")
    for recorded in (output, getattr(args, "tokenizer", None)):  # in the manifest
        if recorded is not None:
            refuse_other_encodings(recorded)
    if output is not None and output.endswith(loss_mask.SUFFIX):
        raise UserError(
            f"--output {output!r}: names that end in {loss_mask.SUFFIX} are those of loss masks; choose another"
        )
    try:
        return args.run(args)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(_told(error, output, args.command)) from error


def _told(error: OSError, output: str | None, command: str) -> str:
    """What the system refused, most often to write, and what helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" ({error.filename})" if error.filename else ""
        continues = ": it continues where it stopped" if command == "tokenize" else ""
        return f"the disk of {output} is full{place}; free some space and run the same command again{continues}"
    where = f" (--output {output})" if output is not None else ""
    return f"{error.filename or 'input or output'}: {error.strerror or error}{where}"
