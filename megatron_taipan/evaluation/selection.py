"""`python -m megatron_taipan.evaluation.selection MODEL --text FILE`: which tokens does a model select?

The text is read as one document, in evaluation mode. A table shows the share of the tokens that each S layer selects,
by position and by kind (evaluation/token_kinds.py defines the kinds). `--out` writes a page that shades every token of
the text by the number of layers that select it.
"""

import argparse
import json
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_taipan.checkpoint.files import write_text
from megatron_taipan.errors import UserError, writing
from megatron_taipan.evaluation.gate_decisions import GateDecisions, collect_decisions
from megatron_taipan.evaluation.selection_page import make_page
from megatron_taipan.evaluation.token_kinds import token_kinds
from megatron_taipan.inference.generation import usual_chunk
from megatron_taipan.inference.loading import DTYPES, load_model, parse_device
from megatron_taipan.inference.selection_watch import watched_selection
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly
from megatron_taipan.tokenizer.load import load_tokenizer_file

POSITIONS = (0, 64, 512, 2048)  # where the rows by position begin, in tokens from the start of the document


class TokenGroup(NamedTuple):
    """Tokens of one kind or range of positions, and how many of them are selected."""

    name: str
    tokens: int  # how many
    mean: float | None  # share selected, mean over the layers; None where there is no such token
    shares: list[float | None]  # [s] share that each layer selects


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m megatron_taipan.evaluation.selection", description=__doc__)
    parser.add_argument("model", type=Path, help="a checkpoint, a run's folder of checkpoints, or an exported folder")
    parser.add_argument("--text", type=Path, required=True, help="a file of UTF-8 text")
    parser.add_argument("--out", type=Path, help="write the page here (HTML)")
    parser.add_argument("--json", type=Path, help="write the table's numbers here")
    parser.add_argument("--max-tokens", type=int, default=20_000, help="read the beginning of a longer text only")
    parser.add_argument("--chunk", type=int, help="tokens per pass; bounds the memory; default: 2048, on a GPU 8192")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file; default: the model's")
    parser.add_argument("--ema", action="store_true", help="the weights' moving average (optim.ema_decay)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    if options.max_tokens < 1 or (options.chunk is not None and options.chunk < 1):
        raise UserError(f"--max-tokens={options.max_tokens} and --chunk={options.chunk} must be at least 1")

    text, device = read_text(options.text), parse_device(options.device)
    model, tokenizer, _ = load_model(options.model, DTYPES[options.dtype], ema=options.ema)
    named = options.tokenizer or tokenizer
    if named is None:
        raise UserError(f"{options.model} names no tokenizer; pass --tokenizer FILE")
    whole, parts = load_tokenizer_file(named).encode_with_bytes(text)
    parts = truncate_tokens(parts, options.max_tokens)
    ids = whole[: len(parts)]
    with watched_selection(model, str(options.model)):
        decisions = collect_decisions(model.to(device), ids, options.chunk or usual_chunk(device))
    groups = group_tokens(decisions, token_kinds(ids, parts))

    summary = {
        "model": str(options.model), "pattern": model.config.pattern, "text": str(options.text), "tokens": len(ids),
        "text_tokens": len(whole),
    }  # fmt: skip
    cells = table_cells(groups, decisions.layers)
    report = json_report(summary, groups, decisions)
    for file, content in (
        (options.json, lambda: json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
        (options.out, lambda: make_page(summary, ids, parts, decisions, cells)),
    ):
        if file is not None:
            with writing(file):
                write_text(file, content())
    print(f"{options.model} reads {len(ids):,} of the {len(whole):,} tokens of {options.text}; share selected:\n")
    print(aligned_table(cells))
    return 0


def read_text(file: Path) -> str:
    """The text as it is, ends of lines included.

    Raises:
        UserError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read a text from {file}: {error}") from error
    if not text:
        raise UserError(f"{file} is empty; give a file of text")
    return text


def truncate_tokens(parts: list[bytes], most: int) -> list[bytes]:
    """The first `most` tokens, and the rest of a character that several tokens share."""
    rest = b"".join(parts[most:])
    while rest and rest[0] & 0xC0 == 0x80:  # not the first byte of a character
        most, rest = most + 1, rest[len(parts[most]) :]
    return parts[:most]


def group_tokens(decisions: GateDecisions, kinds: dict[str, list[bool]]) -> list[TokenGroup]:
    """The table's rows: all tokens, by position, by kind."""
    l = decisions.selected.shape[1]
    position = torch.arange(l)
    masks = {"all": torch.ones(l, dtype=torch.bool)}
    for first, end in zip_longest(POSITIONS, POSITIONS[1:]):
        name = f"position {first:,} and beyond" if end is None else f"position {first:,} to {end - 1:,}"
        masks[name] = (position >= first) & (position < (l if end is None else end))
    masks |= {kind: torch.tensor(of_it) for kind, of_it in kinds.items()}
    return [_token_group(name, decisions.selected[:, mask]) for name, mask in masks.items()]


def _token_group(name: str, selected: Tensor) -> TokenGroup:
    """The group of some tokens, from their decisions [s, n]."""
    if not selected.shape[1]:
        return TokenGroup(name, 0, None, [None] * len(selected))
    shares = selected.double().mean(1)  # [s]
    return TokenGroup(name, selected.shape[1], shares.mean().item(), shares.tolist())


def table_cells(groups: list[TokenGroup], layers: list[int]) -> list[list[str]]:
    """The cells of the table, the header first; shares in percent."""
    header = ["kind", "tokens", "mean", *(f"layer {layer}" for layer in layers)]
    return [header, *([g.name, f"{g.tokens:,}", *map(percent, (g.mean, *g.shares))] for g in groups)]


def percent(share: float | None) -> str:
    """A cell of the table."""
    return "–" if share is None else f"{share:.1%}"


def aligned_table(cells: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal: names on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        " | ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "\n".join(f"| {line} |" for line in lines)


def json_report(summary: dict, groups: list[TokenGroup], decisions: GateDecisions) -> dict:
    """What --json writes: shares from 0 to 1, null where there is no token; tokens_by_layers[k]: tokens that k layers
    select."""
    by_layers = decisions.selected.sum(0).bincount(minlength=len(decisions.layers) + 1)
    return summary | {
        "layers": decisions.layers,
        "mean_alpha_selected": [
            a[s].mean().item() if s.any() else None for a, s in zip(decisions.alpha, decisions.selected, strict=True)
        ],
        "tokens_by_layers": by_layers.tolist(),
        "groups": [g._asdict() for g in groups],
    }


if __name__ == "__main__":
    sys.exit(main())
