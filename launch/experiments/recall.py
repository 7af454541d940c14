"""Multi-query associative recall: can the model look up what it read? Mamba-2, Samba-like and Taipan, side by side.

The task (arXiv 2312.04927, Zoology): a row shows n_pairs key-value pairs, then asks for the values of the keys in
random order among filler tokens. A state of fixed size must hold all pairs; attention can go back and look. The
score is the fraction of asked values that the model ranks first, on rows it has never seen.

    python -m launch.experiments.recall --out docs/recall

Everything (models of equal size, steps, seeds) stands in `Settings`; the table goes to OUT.md, the numbers to
OUT.json, the picture to OUT.svg.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_taipan.config import AttentionConfig, GateConfig, MambaConfig, ModelConfig
from megatron_taipan.evaluation.calibrate import calibrate
from megatron_taipan.model.taipan import Taipan


@dataclass(frozen=True)
class Settings:
    """One experiment. Lengths in tokens."""

    seq_len: int = 64
    n_pairs: tuple[int, ...] = (4, 8, 16)  # trained on all of them in equal shares; scored separately
    vocab_size: int = 256
    d_model: int = 64
    d_state: int = 4
    steps: int = 3000
    batch: int = 36
    lr: float = 3e-3
    warmup: int = 100
    seeds: tuple[int, ...] = (0,)
    capacity: float = 0.15
    budget_lambda: float = 1.0
    test_rows: int = 256


# Equal size: an attention layer with its SwiGLU counts as much as two Mamba-2 layers here (the table prints the sizes).
MODELS = {"mamba2": "M*6", "samba": "M*2 W M*2", "taipan": "M*2 S M*2"}


def make_rows(s: Settings, n_pairs: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """tokens and labels [rows, seq_len]; labels are -1 where nothing is asked.

    Ids: 0 is filler, keys are 1 .. v/2 - 1, values v/2 .. v - 1. The row: k1 v1 k2 v2 ... then every key once more, in
    random order at random places; the label at such a key is its value.
    """
    half = s.vocab_size // 2
    keys = torch.rand(rows, half - 1, generator=generator).topk(n_pairs).indices + 1  # distinct
    values = torch.randint(half, s.vocab_size, (rows, n_pairs), generator=generator)
    tokens = torch.zeros(rows, s.seq_len, dtype=torch.int64)
    labels = torch.full_like(tokens, -1)
    tokens[:, 0 : 2 * n_pairs : 2], tokens[:, 1 : 2 * n_pairs : 2] = keys, values
    room = s.seq_len - 2 * n_pairs
    places = torch.rand(rows, room, generator=generator).topk(n_pairs).indices + 2 * n_pairs  # of key 0, 1, ...
    tokens.scatter_(1, places, keys)
    labels.scatter_(1, places, values)
    return tokens, labels


def make_model(name: str, s: Settings, seed: int) -> Taipan:
    config = ModelConfig(
        pattern=MODELS[name], vocab_size=s.vocab_size, d_model=s.d_model, d_ff=s.d_model,
        mamba=MambaConfig(d_state=s.d_state, headdim=32, chunk_size=32),
        attention=AttentionConfig(n_heads=4, window=s.seq_len),
        gate=GateConfig(capacity=s.capacity, budget_lambda=s.budget_lambda),
    )  # fmt: skip
    return Taipan(config, seed=seed)


def run(name: str, s: Settings, seed: int, device: torch.device) -> dict:
    """Trains one model and scores it; every model sees the same rows in the same order."""
    model = make_model(name, s, seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.1, betas=(0.9, 0.95))
    rows = torch.Generator().manual_seed(1000 + seed)
    began = time.perf_counter()
    for step in range(s.steps):
        parts = [make_rows(s, n, s.batch // len(s.n_pairs), rows) for n in s.n_pairs]
        tokens, labels = (torch.cat(p).to(device) for p in zip(*parts, strict=True))
        rate = min((step + 1) / s.warmup, 0.5 * (1 + math.cos(math.pi * step / s.steps)))
        for group in optimizer.param_groups:
            group["lr"] = s.lr * rate
        samples = torch.arange(step * s.batch, (step + 1) * s.batch, device=device)
        out = model(tokens, labels=labels.clamp(min=0), loss_mask=(labels >= 0).float(), samples=samples, step=step)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step == s.steps - 1:
            print(f"  {name} seed {seed} step {step:5d} loss {out.ce_loss.item():.3f}", flush=True)
    model.eval()
    result = {
        "model": name, "seed": seed, "pattern": MODELS[name], "params": model.num_params(),
        "train_ce": out.ce_loss.item(), "seconds": round(time.perf_counter() - began, 1),
        "accuracy": {n: score(model, s, n, seed, device) for n in s.n_pairs},
    }  # fmt: skip
    if out.gate_stats:
        result["selected_train"] = [g["selected"].item() for g in out.gate_stats]
        with torch.no_grad():
            tokens, _ = make_rows(s, max(s.n_pairs), s.test_rows, torch.Generator().manual_seed(5000 + seed))
            stats = model(tokens.to(device), all_logits=False).gate_stats
        result["selected_eval"] = [g["selected"].item() for g in stats]
        held_out = [make_rows(s, n, s.test_rows, torch.Generator().manual_seed(7000 + seed))[0] for n in s.n_pairs]
        batches = [{"tokens": tokens.to(device), "seq_idx": None} for tokens in held_out]
        result["thresholds"] = calibrate(model, batches)
        result["accuracy_calibrated"] = {n: score(model, s, n, seed, device) for n in s.n_pairs}
    return result


@torch.no_grad()
def score(model: Taipan, s: Settings, n_pairs: int, seed: int, device: torch.device) -> float:
    """Fraction of asked values that are ranked first, on unseen rows."""
    tokens, labels = (
        t.to(device) for t in make_rows(s, n_pairs, s.test_rows, torch.Generator().manual_seed(9000 + seed))
    )
    right = asked = 0
    for part, wanted in zip(tokens.split(64), labels.split(64), strict=True):
        hits = model(part).logits.argmax(-1) == wanted
        right, asked = right + hits.sum().item(), asked + (wanted >= 0).sum().item()
    return right / asked


def table(results: list[dict], s: Settings) -> str:
    """The results as Markdown: mean over seeds, and every seed's figure behind it."""
    lines = [
        "| model | pattern | parameters | "
        + " | ".join(f"{n} pairs" for n in s.n_pairs)
        + " | selected in evaluation |",
        "|---" * (4 + len(s.n_pairs)) + "|",
    ]

    def row(name: str, runs: list[dict], key: str, share: str) -> str:
        cells = []
        for n in s.n_pairs:
            figures = [r[key][n] for r in runs]
            each = ", ".join(f"{v:.2f}" for v in figures)
            cells.append(f"{sum(figures) / len(figures):.2f} ({each})")
        return f"| {name} | `{runs[0]['pattern']}` | {runs[0]['params']:,} | {' | '.join(cells)} | {share} |"

    for name in MODELS:
        runs = [r for r in results if r["model"] == name]
        if not runs:
            continue
        selected = [x for r in runs for x in r.get("selected_eval", [])]
        lines.append(row(name, runs, "accuracy", f"{sum(selected) / len(selected):.2f}" if selected else "–"))
        if selected:
            lines.append(row(f"{name}, calibrated", runs, "accuracy_calibrated", f"{s.capacity:.2f}"))
    return "\n".join(lines) + "\n"


def plot(results: list[dict], s: Settings, path: Path) -> None:
    """Accuracy against the number of pairs, one line a model, as SVG (no plotting library needed)."""
    colours = {"mamba2": "#888888", "samba": "#1f77b4", "taipan": "#d62728"}
    width, height, left, top = 460, 300, 60, 20
    x = {n: left + i * (width - left - 110) / max(len(s.n_pairs) - 1, 1) for i, n in enumerate(s.n_pairs)}

    def y(value: float) -> float:
        return top + (1 - value) * (height - top - 50)

    frame = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    parts = [f'<svg {frame} font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line x1="{left}" x2="{width - 110}" y1="{y(value)}" y2="{y(value)}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(value) + 4}" text-anchor="end">{value:.2f}</text>')
    for n in s.n_pairs:
        parts.append(f'<text x="{x[n]}" y="{height - 32}" text-anchor="middle">{n}</text>')
    caption, middle = f"key-value pairs in {s.seq_len} tokens", (left + width - 110) / 2
    parts.append(f'<text x="{middle}" y="{height - 10}" text-anchor="middle">{caption}</text>')
    for row, name in enumerate(MODELS):
        runs = [r for r in results if r["model"] == name]
        if not runs:
            continue
        means = [sum(r["accuracy"][n] for r in runs) / len(runs) for n in s.n_pairs]
        points = " ".join(f"{x[n]:.1f},{y(v):.1f}" for n, v in zip(s.n_pairs, means, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        parts.append(f'<text x="{width - 95}" y="{top + 20 + 18 * row}" fill="{colours[name]}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/recall"), help="path of the results without ending")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    for name, value in asdict(Settings()).items():
        many = isinstance(value, tuple)
        kind = type(value[0]) if many else type(value)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=value, nargs="+" if many else None, help=f"default {value}")
    args = vars(parser.parse_args())
    out, models = args.pop("out"), args.pop("models")
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    s = Settings(**options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict] = []
    for name in models:
        for seed in s.seeds:
            results.append(run(name, s, seed, device))
            print(json.dumps(results[-1]), flush=True)
            out.with_suffix(".json").write_text(json.dumps({"settings": asdict(s), "results": results}, indent=1))
    out.with_suffix(".md").write_text(table(results, s))
    plot(results, s, out.with_suffix(".svg"))
    print(table(results, s))


if __name__ == "__main__":
    main()
