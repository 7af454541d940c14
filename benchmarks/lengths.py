"""`python -m benchmarks lengths`: tokens per second by length of the rows, at one number of tokens a step.

A step takes `--tokens` at every length (32 rows of 4K, one of 128K), so that AdamW weighs the same in each. Its
micro-batches have `--micro-tokens`; a longer row is a micro-batch by itself. Layers recompute as little as memory
allows: nothing, else `selective`, else `full`. Every result says which, since it costs time: where a line changes it,
its fall is not the length's alone. With `--recompute full` all lengths are alike.

A row is one document. Models with `A` layers run without document masks, so that cuDNN's attention, the fastest for
whole rows, takes them as it takes the peer's (`--overrides data.mask_documents=true`: with masks).

Each result is a line of OUT/lengths.jsonl. The same command makes only those that are missing, so that it can be run in
parts (`--until`). `--table` prints Markdown and draws OUT/lengths.svg and OUT/lengths-memory.svg, and needs no GPU.

A line belongs to the configuration that it was measured with, not only to this command: where a default or a preset has
changed since, the same command measures again, and until then the table marks the line. It also says whether layers ran
as CUDA graphs, and by which commits the lines were made.
"""

import argparse
import gc
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import add_out, preset
from benchmarks.in_parts import key_of, make_runs, read_results, read_runs
from benchmarks.step import our_step, timed, transformer_training
from megatron_taipan.checkpoint.metadata import dotted_settings
from megatron_taipan.config import Config
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.lengths import length_name, parse_length
from megatron_taipan.evaluation.results import Row, markdown_table
from megatron_taipan.train.metadata import git_commit

PRESETS = ["taipan_1.3b", "mamba2_1.3b", "samba_1.3b", "jamba_1.3b", "transformerpp_1.3b"]
LENGTHS = ["4K", "8K", "16K", "32K", "64K", "128K"]
PEER, SIZES_OF_PEER = "Transformer++, compiled", "transformerpp_1.3b"
RECOMPUTE = ["none", "selective", "full"]  # from the fastest to what needs least memory
STEPS = {"warm": 1, "repeats": 3}  # after the first one; a step takes 2 to 20 seconds
OF_A_STEP = {"model", "data", "parallel", "optim", "train", "ops"}  # sections of the configuration
OF_A_LINE = {"data.seq_len", "train.global_batch", "train.micro_batch", "parallel.recompute"}  # what a line says itself
OTHER = "made with another configuration (other defaults or presets, or by a version that did not say which)"
FREE = 2 << 30  # bytes that may stay in use after a measurement: workspaces of libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument(
        "--presets",
        nargs="*",
        default=PRESETS,
        help="files of launch/configs, without their ending; none: --peer alone",
    )
    parser.add_argument(
        "--peer", action="store_true", help=f"also the compiled Transformer++ of {SIZES_OF_PEER}'s sizes"
    )
    parser.add_argument("--lengths", nargs="+", type=parse_length, default=list(map(parse_length, LENGTHS)),
                        help="tokens of a row, such as 4K 8K")  # fmt: skip
    parser.add_argument("--tokens", type=parse_length, default=128 << 10, help="of a step; default: 128K")
    parser.add_argument("--micro-tokens", type=parse_length, default=16 << 10, help="of a micro-batch; default: 16K")
    parser.add_argument("--recompute", choices=["auto", *RECOMPUTE], default="auto", help="default: as little as fits")
    parser.add_argument("--ops", default="fast", choices=["fast", "auto", "reference"])
    parser.add_argument("--overrides", nargs="*", default=[], help="settings such as model.gate={}")
    parser.add_argument(
        "--until", type=float, metavar="SECONDS",
        help="start no measurement that would end later, if it takes as long as the longest of this call so far",
    )  # fmt: skip
    parser.add_argument("--expect", type=float, default=60.0, help="seconds of a measurement, until one has ended")
    parser.add_argument("--table", action="store_true", help="print and draw what OUT holds, and measure nothing")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    file = options.out / "lengths.jsonl"
    if options.table:
        make_report(options, read_results(file))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    wanted = wanted_runs(options, device)
    done = read_runs(file)
    others = {key_of(without_config(record["run"])) for record in done.values() if "result" in record}
    if again := sum(key_of(what) not in done and key_of(without_config(what)) in others for what in wanted):
        print(f"{again} of these were {OTHER}, and are measured again", flush=True)
    minutes = None if options.until is None else options.until / 60
    left = make_runs(file, wanted, lambda what, _: measure(what, file), minutes, expected=options.expect)
    print(f"{len(wanted) - left} of {len(wanted)} are in {file}" + ("; the same command goes on" if left else ""))


def wanted_runs(options: argparse.Namespace, device: str) -> list[dict]:
    """What identifies each measurement, model by model.

    Raises:
        UserError: as `config_of`.
    """
    settings = {"tokens": options.tokens, "micro_tokens": options.micro_tokens, "recompute": options.recompute,
                "ops": options.ops, "overrides": options.overrides, "device": device}  # fmt: skip
    models = [*options.presets, *([PEER] if options.peer else [])]
    runs = [{"model": model, "length": length, **settings} for model in models for length in sorted(options.lengths)]
    return [run | {"config": digest_of(config_of(run, "none"))} for run in runs]


def digest_of(config: Config) -> str:
    """Of all that the configuration says of a step, defaults too, but for what a line says itself."""
    tree = dotted_settings(config.model_dump(mode="json", include=OF_A_STEP))
    text = json.dumps({name: value for name, value in tree.items() if name not in OF_A_LINE}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def without_config(run: dict) -> dict:
    """A measurement by its command alone: lines of earlier versions say no more."""
    return {name: value for name, value in run.items() if name != "config"}


def config_of(what: dict, recompute: str) -> Config:
    """The run of one measurement.

    Raises:
        UserError: its micro-batches do not add up to the tokens of a step.
    """
    length, tokens, rows = what["length"], what["tokens"], rows_of_micro_batch(what)
    if tokens % (rows * length):
        raise UserError(
            f"--tokens {tokens} is not a multiple of a micro-batch of {rows} x {length} (remainder"
            f" {tokens % (rows * length)}), so a step would not have the same tokens at every length; take"
            f" --tokens {-(-tokens // (rows * length)) * rows * length}, or other --lengths or --micro-tokens"
        )
    name = SIZES_OF_PEER if what["model"] == PEER else what["model"]
    overrides = [f"data.seq_len={length}", f"parallel.recompute={recompute}", f"train.global_batch={tokens // length}"]

    def with_overrides(*first: str) -> Config:
        chosen = {"preset": name, "batch": rows, "ops": what["ops"]}
        return preset(argparse.Namespace(**chosen, overrides=[*first, *overrides, *what["overrides"]]))

    config = with_overrides()
    return with_overrides("data.mask_documents=false") if "A" in config.model.letters else config


def rows_of_micro_batch(what: dict) -> int:
    return max(1, what["micro_tokens"] // what["length"])


def measure(what: dict, file: Path) -> dict:
    """The median step with as little recomputation as fits, or that it fits with none.

    Raises:
        RuntimeError: an earlier measurement's memory was not freed, so this one would measure too little.
    """
    held = torch.cuda.memory_allocated()
    if held > FREE:
        raise RuntimeError(f"{held / 2**30:.1f} GiB are still in use; start the same command again, in a new process")
    wanted = RECOMPUTE if what["recompute"] == "auto" else [what["recompute"]]
    if what["model"] == PEER:
        wanted = ["none"]  # it has no other
    rows, too_large = rows_of_micro_batch(what), known_too_large(what, file)
    shape = {"rows": rows, "micro_batches": what["tokens"] // (rows * what["length"])}
    for recompute in wanted:
        if recompute in too_large:
            continue
        numbers = attempt(what, recompute)
        gc.collect()
        torch.cuda.empty_cache()
        if numbers is not None:
            return {"recompute": recompute, **shape, **numbers, "out_of_memory": too_large, **about()}
        too_large.append(recompute)
    return {"failed": "out of memory", **shape, "out_of_memory": too_large, **about()}


def known_too_large(what: dict, file: Path) -> list[str]:
    """The kinds of recomputation with which as many tokens or fewer a micro-batch did not fit, by lines alike."""
    found = []
    for record in read_runs(file).values():
        other = record["run"]
        alike = other | {"length": what["length"]} == what
        fewer = rows_of_micro_batch(other) * other["length"] <= rows_of_micro_batch(what) * what["length"]
        if alike and fewer:
            found += record.get("result", {}).get("out_of_memory", [])
    return [kind for kind in RECOMPUTE if kind in found]


def attempt(what: dict, recompute: str) -> dict | None:
    """As `benchmarks step` measures it; None where it does not fit."""
    config = config_of(what, recompute)
    print(f"{what['model']}, rows of {length_name(what['length'])}, recompute {recompute}", flush=True)
    try:
        if what["model"] != PEER:
            return our_step(config, profiled=False, **STEPS)
        torch.compiler.reset()  # a second length would be compiled for all lengths, and be slower
        return timed(transformer_training(config), config, profiled=False, **STEPS)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        return None


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory of the GPU was missing: kernels and the end of a recording say so by errors of other types."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def about() -> dict[str, str | None]:
    return {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "commit": git_commit()}


def make_report(options: argparse.Namespace, records: list[dict]) -> None:
    """Tables and pictures of the results with the settings of this command.

    Raises:
        UserError: there are none.
    """
    lines = lines_of(options, records)
    if not lines:
        raise UserError(
            f"{options.out} holds no result of these models, lengths, --tokens, --micro-tokens, --recompute, --ops and"
            " --overrides; give those that it was measured with"
        )
    devices = sorted({record["run"]["device"] for record, _ in lines})
    rows = [result_row(record, len(devices) > 1, other) for record, other in lines]
    print(f"{options.tokens:,} tokens a step; {', '.join(devices)}; {made_at(record for record, _ in lines)}\n")
    if any(other for _, other in lines):
        print(f"*: {OTHER}; without --table they are measured again\n")
    print(markdown_table(by_length(rows)), end="\n\n")
    print(markdown_table([{name: value for name, value in row.items() if name != "length"} for row in rows]))
    draw(options, rows, ", ".join(devices))


def lines_of(options: argparse.Namespace, records: list[dict]) -> list[tuple[dict, bool]]:
    """The lines of this command on any device, and whether each is of another configuration than it has now; of two
    that differ in that alone, the one that has it."""
    wanted = {key_of(without_config(run)): run["config"] for run in wanted_runs(options, "any")}
    found: dict[str, tuple[dict, bool]] = {}
    for record in records:
        command = without_config(record["run"])
        config = wanted.get(key_of(command | {"device": "any"}))
        other = record["run"].get("config") != config
        if config is not None and not (other and key_of(command) in found):
            found[key_of(command)] = (record, other)
    return list(found.values())


def made_at(records: Iterable[dict]) -> str:
    """The commits that the lines say, in words."""
    commits = dict.fromkeys(record.get("result", {}).get("commit") for record in records)
    short = [commit[:9] + ("+changes" if "+" in commit else "") for commit in commits if commit]
    return f"at {', '.join([*short, *(['commits not recorded'] if None in commits else [])])}"


def result_row(record: dict, name_device: bool, other: bool) -> Row:
    """A measurement as a row of the long table, marked if it is of another configuration."""
    what, result = record["run"], record.get("result", {"failed": record.get("error")})
    fits = "failed" not in result
    return {
        "length": what["length"],
        "model": f"{what['model']}, {what['device']}" if name_device else what["model"],
        "row": length_name(what["length"]),
        "micro-batches": f"{result['micro_batches']} x {result['rows']}" if "rows" in result else None,
        "recomputation": (result["recompute"] if fits else result["failed"]) + "*" * other,
        "layers": None if "layers" not in result else "graphs" if "CUDA graphs" in result["layers"] else "one by one",
        **{name: result.get(name) for name in ("ms", "tokens/s", "GiB", "selected", "allocations retried")},
    }


def by_length(rows: list[Row]) -> list[Row]:
    """Tokens per second, a row a model and a column a length."""
    lengths = sorted({row["length"] for row in rows})
    table: dict[str, Row] = {}
    for row in rows:
        line = table.setdefault(row["model"], {"tokens/s": row["model"], **{length_name(n): None for n in lengths}})
        line[row["row"]] = tokens_cell(row)
    return list(table.values())


def tokens_cell(row: Row) -> Any:
    if row["tokens/s"] is None:
        return row["recomputation"]
    return row["tokens/s"] if row["recomputation"] == "none" else f"{row['tokens/s']:,} ({row['recomputation']})"


def draw(options: argparse.Namespace, rows: list[Row], devices: str) -> None:
    """lengths.svg and lengths-memory.svg; a word beside a point says which recomputation, if any."""
    from megatron_taipan.evaluation.figures import Curve, write_curves

    lines: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row["tokens/s"] is not None), key=lambda row: row["length"]):
        lines.setdefault(row["model"], []).append(row)

    def curves(column: str) -> list[Curve]:
        return [
            Curve(model, [row["length"] for row in line], [row[column] for row in line],
                  "o--" if model.startswith(PEER) else "o-",
                  ["" if row["recomputation"] == "none" else row["recomputation"] for row in line])
            for model, line in lines.items()
        ]  # fmt: skip

    if not lines:
        return
    x, title, folder = "tokens in a row", f"{options.tokens:,} tokens a step, {devices}", options.out
    write_curves(folder / "lengths.svg", curves("tokens/s"), x=x, y="tokens/s", title=title, log_x=True, log_y=True)
    write_curves(folder / "lengths-memory.svg", curves("GiB"), x=x, y="GiB held", title=title, log_x=True)
