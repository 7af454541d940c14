"""Results of the runs of experiments/real_text.py: from their logs, and all of them as a table."""

import json
from pathlib import Path
from statistics import fmean, median

from megatron_taipan.layer_kinds.metrics import logged

LAST = 50  # steps at the end of a run that are averaged
POINTS = 12  # of a run's course


def read_log(log: Path) -> dict:
    """Losses, speed, and what the gates did, from a run's log.jsonl.

    Returns:
        valid: [step, loss] of each validation; train_loss: mean over the last steps, nats a token.
        tokens, tokens_per_s (median), epochs of the data, skipped steps.
        selected_training, alpha, entropy: by S layer, means over the last steps; selected_evaluation: of the last
            validation; course: step, ce, and selected and selected_eval by S layer, at a few steps.
    """
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [r for r in records if r["event"] == "step"]
    valid = [r for r in records if r["event"] == "valid"]
    last = steps[-LAST:]

    def mean(metric: str, rows: list[dict], digits: int = 4) -> dict[str, float]:
        measured = [logged(r, metric) for r in rows]
        return {layer: round(fmean(m[layer] for m in measured), digits) for layer in measured[-1]}

    return {
        "valid": [[r["step"], round(r["ce"], 5)] for r in valid],
        "train_loss": round(fmean(r["ce"] for r in last), 4),
        "tokens": sum(r["tokens"] for r in steps),
        "tokens_per_s": round(median(r["tokens_per_s"] for r in steps)),
        "epochs": max((v for k, v in steps[-1].items() if k.startswith("epochs/")), default=None),
        "skipped": sum(r["skipped"] for r in steps),
        "selected_training": mean("selected", last),
        "alpha": mean("alpha", last),
        "entropy": mean("entropy", last),
        "selected_evaluation": mean("selected", valid[-1:]),
        "course": [
            {"step": r["step"], "ce": round(r["ce"], 3), **{n: mean(n, [r], 3) for n in ("selected", "selected_eval")}}
            for r in steps[:: max(1, len(steps) // POINTS)]
        ],
    }


def results_table(records: list[dict]) -> str:
    """Markdown: for each corpus and length of run one line per recipe and setting, in the order of their losses.

    A loss is the mean over the seeds in nats per token, with half of their spread; the columns after "all" are the
    classes of evaluation/recall_tokens.py. Shares selected are given layer by layer.
    """
    sets: dict[str, dict[str, list[dict]]] = {}
    for record in records:
        if "result" in record:
            run, result = record["run"], record["result"]
            about = f"{result['tokens'] / 1e6:.0f}M tokens of `{run['data']}`, {result['epochs']:.1f} epochs"
            about = f"{run.get('network', 'real_text')}.yaml, {about}"
            label = " ".join([run["recipe"], *run["overrides"]])
            sets.setdefault(about, {}).setdefault(label, []).append(result)
    return "\n".join(f"{about}:\n\n{one_table(rows)}" for about, rows in sets.items())


def one_table(rows: dict[str, list[dict]]) -> str:
    """The lines of one corpus and length of run."""
    classes = list(dict.fromkeys(name for runs in rows.values() for r in runs for name in r["by_distance"]))
    heads = ["recipe", "parameters", "seeds", *classes, "selected: training", "evaluation", "tokens/s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for label, runs in sorted(rows.items(), key=lambda item: fmean(r["by_distance"]["all"][0] for r in item[1])):
        losses = [mean_and_spread([r["by_distance"][name][0] for r in runs]) for name in classes]
        shares = [
            ", ".join(f"{fmean(layer):.2f}" for layer in zip(*(by_layer(r[key]) for r in runs), strict=True)) or "–"
            for key in ("selected_training", "selected_evaluation")
        ]
        size, speed = f"{runs[0]['params'] / 1e6:.1f}M", f"{median(r['tokens_per_s'] for r in runs):,.0f}"
        lines.append("| " + " | ".join([label, size, str(len(runs)), *losses, *shares, speed]) + " |")
    return "\n".join(lines) + "\n"


def by_layer(shares: dict[str, float] | list[float]) -> list[float]:
    """Layer by layer; older results have a list."""
    return list(shares.values()) if isinstance(shares, dict) else shares


def mean_and_spread(values: list[float]) -> str:
    """The mean, and half of the spread where there are several."""
    spread = f" ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"
