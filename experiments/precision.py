"""The same run in fp32, TF32, bf16 and fp16: do the lower precisions learn what fp32 learns?

    python -m experiments.precision --out docs/precision

A 50M-parameter Taipan (experiments/precision.yaml) trains for 300 steps on the State of the Union addresses, each
precision in a separate process through launch/pretrain.py, with the same weights, samples and gate noise. fp32 runs the
reference operations in plain torch, the others the kernels. The losses are compared in windows of 20 steps; bf16 and
fp16 should stay within 1 % of fp32. On a CPU fp16 is refused and TF32 is fp32. The table goes to OUT.md, every loss to
OUT.json, whenever a run ends.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.common import hardware
from megatron_taipan.checkpoint.run_log import LOG, read_records
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.rank_environment import without_rank
from megatron_taipan.programs import exits_cleanly

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "data_prep" / "sample" / "state_of_the_union.jsonl.gz"
PRECISIONS = {
    # in plain torch, so that the kernels of the others are compared with it, too
    "fp32": ["train.precision=fp32", "train.tf32=false", "ops.backend=reference"],
    "tf32": ["train.precision=fp32", "train.tf32=true"],
    "bf16": ["train.precision=bf16"],
    "fp16": ["train.precision=fp16"],
}


def prepare_data(folder: Path, vocab_size: int) -> Path:
    """A sentencepiece tokenizer of the sample and the sample as token ids, made once; returns the ids' prefix."""
    prefix, tokenizer = folder / "text", folder / "tokenizer.model"
    if prefix.with_suffix(".idx").exists():
        return prefix
    folder.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "data_prep"]
    train = ["train-tokenizer", "--input", str(TEXT), "--vocab-size", str(vocab_size), "--output", str(tokenizer)]
    encode = ["tokenize", "--input", str(TEXT), "--tokenizer", str(tokenizer), "--append-eod", "--output", str(prefix)]
    for arguments in (train, encode):
        subprocess.run([*program, *arguments], check=True, cwd=ROOT)
    return prefix


def run(name: str, prefix: Path, work: Path, overrides: list[str], seconds: float | None) -> dict:
    """One training run of at most `seconds` seconds: the results from its log, or how it failed."""
    directory = work / name
    shutil.rmtree(directory, ignore_errors=True)  # of an earlier call
    directory.mkdir(parents=True)
    command = [
        sys.executable,
        str(ROOT / "launch" / "pretrain.py"),
        "--config",
        str(Path(__file__).with_suffix(".yaml")),
    ]
    command += [f"data.train={prefix}", f"checkpoint.dir={directory}", *PRECISIONS[name], *overrides]
    environment = without_rank(os.environ)
    began = time.perf_counter()
    with (directory / "stderr.txt").open("w", encoding="utf-8") as said:
        try:
            status = subprocess.run(command, cwd=ROOT, env=environment, stderr=said, timeout=seconds).returncode
        except subprocess.TimeoutExpired:  # it was killed; the log has every step it made
            status = 0
    log = directory / LOG
    records = list(read_records(log)) if log.exists() else []
    steps = [record for record in records if record["event"] == "step"]
    if status or not steps:
        lines = (directory / "stderr.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1:] or ["no message"]
        return {"failed": f"status {status}, {len(steps)} steps: {last[0][:300]}"}
    valid = [record["ce"] for record in records if record["event"] == "valid"]
    scales = [record["loss_scale"] for record in steps if "loss_scale" in record]
    for path in directory.glob("step_*"):
        shutil.rmtree(path)  # only the losses are needed
    return {
        "ce": [record["ce"] for record in steps],
        "skipped": sum(record["skipped"] for record in steps),
        "valid": valid[-1] if len(valid) > 1 else None,  # the first is the untrained model's
        "loss_scale": scales[-1] if scales else None,
        "seconds": round(time.perf_counter() - began, 1),
    }


def smoothed(losses: list[float | None], window: int) -> list[float]:
    """Means of consecutive windows; steps without a loss (skipped ones that overflowed) are left out."""
    parts = [[x for x in losses[at : at + window] if x is not None] for at in range(0, len(losses), window)]
    return [sum(part) / len(part) if part else math.nan for part in parts]


def compare_losses(results: dict[str, dict], window: int) -> dict[str, dict]:
    """Largest and last relative difference of the smoothed loss from fp32's over the steps that both have taken, and of
    the validation loss at the end."""
    rows: dict[str, dict] = {}
    for name, result in results.items():
        if "failed" in result:
            rows[name] = result
            continue
        ours = smoothed(result["ce"], window)
        row = {"steps": len(result["ce"]), "last": ours[-1], "valid": result["valid"], "skipped": result["skipped"],
               "loss_scale": result["loss_scale"], "seconds": result["seconds"]}  # fmt: skip
        full = results.get("fp32", {})
        if "ce" in full:
            theirs = smoothed(full["ce"], window)
            whole = min(len(result["ce"]), len(full["ce"])) // window  # windows that both have finished
            apart = [(a - b) / b for a, b in zip(ours[:whole], theirs[:whole], strict=True)]
            row |= {"largest": max(apart, key=abs), "at_end": apart[-1], "compared": whole * window} if apart else {}
            if None not in (result["valid"], full["valid"]):
                row["valid_apart"] = (result["valid"] - full["valid"]) / full["valid"]
        rows[name] = row
    return rows


def comparison_table(rows: dict[str, dict], window: int) -> str:
    """The comparison as Markdown."""
    lines = [
        f"| precision | steps | loss, last {window} | validation loss | steps compared with fp32 | largest difference"
        f" in any {window} | in the last {window} | in validation | skipped | seconds |",
        "|---" * 10 + "|",
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | not run: {row['failed']} |" + " |" * 8)
            continue
        apart = [f"{100 * row[key]:+.3f} %" if key in row else "–" for key in ("largest", "at_end", "valid_apart")]
        valid = "–" if row["valid"] is None else f"{row['valid']:.4f}"
        lines.append(
            f"| {name} | {row['steps']} | {row['last']:.4f} | {valid} | {row.get('compared', '–')} |"
            f" {' | '.join(apart)} | {row['skipped']} | {row['seconds']} |"
        )
    return "\n".join(lines) + "\n"


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/precision/result"), help="results, without ending")
    parser.add_argument("--work", type=Path, default=Path("runs/precision"), help="folder of the data and the runs")
    parser.add_argument("--only", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--jobs", type=int, default=4, help="runs at once on the one device")
    parser.add_argument("--window", type=int, default=20, help="steps that are averaged before losses are compared")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seconds", type=float, help="end each run after this long; its steps so far are compared")
    parser.add_argument("--against", type=Path, help="JSON of an earlier call: its runs are listed beside the new ones")
    parser.add_argument("--prepare", action="store_true", help="only make the tokenizer and the token ids")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="options of the runs, such as train.steps=20")
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    prefix = prepare_data(work / "data", options.vocab_size)
    if options.prepare:
        return 0
    overrides = [f"model.vocab_size={options.vocab_size}", *options.overrides]
    about = hardware()
    print("; ".join(f"{k}: {v}" for k, v in about.items()), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = (
        json.loads(options.against.read_text(encoding="utf-8"))["runs"] if options.against else {}
    )
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = {pool.submit(run, name, prefix, work, overrides, options.seconds): name for name in options.only}
        for done in as_completed(waiting):
            results[waiting[done]] = done.result()
            write_report(options, about, {name: results[name] for name in PRECISIONS if name in results})
    if all("failed" in result for result in results.values()):
        raise UserError("every run failed: " + "; ".join(f"{k}: {v['failed']}" for k, v in results.items()))
    return 0


def write_report(options: argparse.Namespace, about: dict, results: dict[str, dict]) -> None:
    """Prints and keeps the comparison of the runs that have ended."""
    rows = compare_losses(results, options.window)
    content = {"about": about, "overrides": options.overrides, "window": options.window, "rows": rows, "runs": results}
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    text = comparison_table(rows, options.window)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
