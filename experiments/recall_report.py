"""Tables and pictures of the runs of experiments/recall.py."""

from pathlib import Path
from statistics import mean

from megatron_taipan.evaluation.figures import Curve, write_curves
from megatron_taipan.layer_kinds.metrics import logged
from megatron_taipan.layer_kinds.registry import kinds_of
from megatron_taipan.layer_kinds.selective import GATE_METRICS
from megatron_taipan.pattern import parse_pattern

ACCURACY = (-0.02, 1.02)  # the axis: points at 0 and 1 are whole


def make_report(records: list[dict], out: Path) -> str:
    """Markdown with a table for each setting, which is also written beside `out`, with its pictures.

    Args:
        records: lines of the file of runs; failed ones are named at the end.
    """
    stem, text = out.with_suffix(""), []
    for number, (about, groups) in enumerate(by_setting([r for r in records if "result" in r]).items()):
        settings = next(iter(groups.values()))[0]["run"]["settings"]
        pairs = [str(n) for n in sorted({*settings["pairs"], *settings["score_pairs"]})]
        trained = [str(n) for n in settings["pairs"]]
        text.append(f"Rows of {about}:\n\n{recall_table(groups, pairs, trained)}")
        end = f"-{settings['seq_len']}-{number + 1}.svg"
        draw_by_pairs(stem.with_name(f"{stem.name}-pairs{end}"), groups, pairs, settings["seq_len"])
        draw_by_share(stem.with_name(f"{stem.name}-share{end}"), groups, trained)
    failed = [f"- {label(r['run'])}, seed {r['run']['seed']}: {r['error']}" for r in records if "error" in r]
    whole = "\n".join([*text, *(["Failed:\n", *failed, ""] if failed else [])])
    stem.with_suffix(".md").write_text(whole, encoding="utf-8")
    return whole


def by_setting(records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Settings in words, then the runs of each label: the seeds of one recipe."""
    sorted_in: dict[str, dict[str, list[dict]]] = {}
    for record in sorted(records, key=lambda r: (r["run"]["settings"]["seq_len"], r["run"]["seed"])):
        s = record["run"]["settings"]
        rest = {name: value for name, value in s.items() if name not in ("seq_len", "window")}
        about = f"{s['seq_len']} tokens; " + ", ".join(f"{name} {value}" for name, value in rest.items() if value != [])
        sorted_in.setdefault(about, {}).setdefault(label(record["run"]), []).append(record)
    return sorted_in


def label(run: dict) -> str:
    """The recipe and what was changed of it."""
    changed = dict(run["changes"])
    if run["settings"]["window"] != run["settings"]["seq_len"]:
        changed["window"] = run["settings"]["window"]
    short = {"capacity": "C", "budget_lambda": "lambda"}
    return ", ".join([run["recipe"], *(f"{short.get(name, name)}={value:g}" for name, value in changed.items())])


def figure(records: list[dict], mode: str, pairs: list[str], name: str) -> list[float]:
    """Each seed's mean over numbers of pairs."""
    return [mean(r["result"]["scores"][mode][n][name] for n in pairs) for r in records]


def mean_and_values(values: list[float]) -> str:
    """The mean, and where there are several values, each of them."""
    each = f" ({', '.join(f'{v:.2f}' for v in values)})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{each}"


def first_gate(result: dict) -> dict[str, float]:
    """What the first gate measured at the end of training; empty without one. Older results have a list of gates."""
    if "gates" in result:
        return result["gates"][0]
    measured = result.get("layer_metrics", {})
    return {name: next(iter(logged(measured, name).values())) for name in GATE_METRICS} if measured else {}


def recall_table(groups: dict[str, list[dict]], pairs: list[str], trained: list[str]) -> str:
    """One row per recipe, and another one with calibrated thresholds where its gate has them."""
    heads = ["recipe", "pattern", "parameters", *(f"{n} pairs" for n in pairs), "mix", "selected in training"]
    heads += ["selected", "of asking tokens", "of others", "alpha", "entropy", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, records in groups.items():
        first = records[0]["result"]
        gates = [gate for r in records if (gate := first_gate(r["result"]))]
        for mode in [m for m in ("evaluation", "calibrated") if m in first["scores"]]:
            cells = [name + (", calibrated" if mode == "calibrated" else ""), f"`{records[0]['run']['pattern']}`"]
            cells.append(f"{first['params']:,}")
            cells += [mean_and_values(figure(records, mode, [n], "accuracy")) for n in pairs]
            cells.append(mean_and_values(figure(records, mode, trained, "accuracy")))
            if gates:
                cells.append(mean_and_values([g["selected"] for g in gates]))
                shares = ("selected", "asking", "others")
                cells += [mean_and_values(figure(records, mode, trained, share)) for share in shares]
                cells += [mean_and_values([g[of] for g in gates]) for of in ("alpha", "entropy")]
            else:
                cells += ["–"] * 6
            cells.append(f"{mean(r['result']['seconds'] for r in records):.0f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_by_pairs(path: Path, groups: dict[str, list[dict]], pairs: list[str], seq_len: int) -> None:
    """Accuracy in evaluation against the number of pairs."""
    places = [float(place) for place in range(len(pairs))]
    curves = [
        Curve(name, places, [mean(figure(records, "evaluation", [n], "accuracy")) for n in pairs], "o-")
        for name, records in groups.items()
    ]
    words = f"key-value pairs in {seq_len} tokens"
    write_curves(path, curves, x=words, y="accuracy", ticks=dict(zip(places, pairs, strict=True)), y_range=ACCURACY)


def draw_by_share(path: Path, groups: dict[str, list[dict]], trained: list[str]) -> None:
    """Accuracy on the trained mix against the share of tokens that attend in evaluation, one point per label. Without a
    gate that is all tokens where a layer attends, else none."""
    points: dict[str, list[tuple[float, float, str]]] = {}
    for name, records in groups.items():
        run = records[0]["run"]
        if first_gate(records[0]["result"]):
            share = mean(figure(records, "evaluation", trained, "selected"))
        else:
            share = float(any(kind.attends for kind in kinds_of(parse_pattern(run["pattern"]).letters)))
        recipe, _, changes = name.partition(", ")
        accuracy = mean(figure(records, "evaluation", trained, "accuracy"))
        points.setdefault(recipe, []).append((share, accuracy, changes))
    curves = []
    for recipe, unordered in points.items():
        shares, accuracies, words = zip(*sorted(unordered), strict=True)
        curves.append(Curve(recipe, shares, accuracies, "o-", words))
    ticks = {share: f"{share:.2f}" for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
    write_curves(path, curves, x="share of tokens selected", y="accuracy on the mix", ticks=ticks, y_range=ACCURACY)
