"""Results of the runs of experiments/real_text.py: from their logs, and all of them as a table."""

import re
from math import exp
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megatron_taipan.checkpoint.run_log import read_course
from megatron_taipan.evaluation.figures import save
from megatron_taipan.layer_kinds.metrics import logged

LAST = 50  # steps at the end of a run that are averaged
POINTS = 12  # of a run's course
SWEPT = "anneal-all-add-one"  # the recipe around which options were changed one by one


def read_log(log: Path) -> dict:
    """Losses, speed, and what the gates did, from a run's log.jsonl.

    Returns:
        valid: [step, loss] of each validation; train_loss: mean over the last steps, nats a token.
        tokens, tokens_per_s (median), epochs of the data, skipped steps.
        selected_training, alpha, entropy: by S layer, means over the last steps; selected_evaluation: of the last
            validation; course: step, ce, and selected and selected_eval by S layer, at a few steps.
    """
    steps, valid = read_course(log)
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
    return "\n".join(
        f"{about}:\n\n{one_table(rows)}\nPerplexity by tokens of context:\n\n{context_table(rows)}"
        for about, rows in grouped(records).items()
    )


def draw_results(records: list[dict], out: Path) -> list[Path]:
    """A picture of `draw_shares` for each corpus and length of run with gates; beside `out`, numbered."""
    drawn = []
    for number, rows in enumerate(grouped(records).values(), 1):
        if any(runs[0]["selected_evaluation"] for runs in rows.values()):
            drawn.append(out.with_name(f"{out.stem}-share-{number}.svg"))
            draw_shares(rows, drawn[-1])
    return drawn


def grouped(records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """The results by corpus and length of run, and there by recipe and settings."""
    sets: dict[str, dict[str, list[dict]]] = {}
    for record in records:
        if "result" in record:
            run, result = record["run"], record["result"]
            about = f"{result['tokens'] / 1e6:.0f}M tokens of `{run['data']}`, {result['epochs']:.1f} epochs"
            about = f"{run.get('network', 'real_text')}.yaml, {about}"
            label = " ".join([run["recipe"], *run["overrides"]])
            sets.setdefault(about, {}).setdefault(label, []).append(result)
    return sets


def context_table(rows: dict[str, list[dict]]) -> str:
    """Markdown: perplexity by tokens of context, geometric means over the seeds, in the order of results_table."""
    lengths = list(next(iter(rows.values()))[0]["by_context"])
    lines = ["| recipe | " + " | ".join(f"{int(n):,}" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for label, runs in by_loss(rows):
        values = [[r["by_context"][n] for r in runs if r["by_context"].get(n) is not None] for n in lengths]
        cells = [f"{exp(fmean(nats)):.2f}" if nats else "–" for nats in values]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines) + "\n"


def by_loss(rows: dict[str, list[dict]]) -> list[tuple[str, list[dict]]]:
    """The recipes, the best first."""
    return sorted(rows.items(), key=lambda item: fmean(r["by_distance"]["all"][0] for r in item[1]))


def draw_shares(rows: dict[str, list[dict]], path: Path) -> None:
    """Picture: loss against the share of the tokens selected in evaluation, mean over layers and seeds; a line for each
    model without gates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for label, runs in rows.items():
        loss = fmean(r["by_distance"]["all"][0] for r in runs)
        if not runs[0]["selected_evaluation"]:
            axes.axhline(loss, color="grey", linestyle=":", linewidth=1)
            axes.text(1.0, loss, label, ha="right", va="bottom", fontsize=8, color="grey")
            continue
        share = fmean(x for r in runs for x in by_layer(r["selected_evaluation"]))
        swept = label.startswith(f"{SWEPT} ") or label == SWEPT
        axes.plot(share, loss, "o", color="tab:orange" if swept else "tab:blue", markersize=7 if swept else 4)
        name = re.sub(
            r"capacity=.*end: ([\d.]+).*", r"C to \1", re.sub(rf"^{SWEPT} |model\.(gate|attention)\.", "", label)
        )
        beside: dict[str, Any] = (
            {"xytext": (-7, -3), "ha": "right", "fontsize": 8}
            if swept
            else {"xytext": (4, 3), "fontsize": 6, "color": "grey"}
        )
        axes.annotate(name, (share, loss), textcoords="offset points", **beside)
    axes.set(xlabel="share of the tokens selected in evaluation, mean over the layers", ylabel="loss, nats a token")
    axes.set_xlim(-0.02, 1)
    save(figure, path)


def one_table(rows: dict[str, list[dict]]) -> str:
    """The lines of one corpus and length of run."""
    classes = list(dict.fromkeys(name for runs in rows.values() for r in runs for name in r["by_distance"]))
    heads = ["recipe", "parameters", "seeds", *classes, "selected: training", "evaluation", "tokens/s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for label, runs in by_loss(rows):
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
