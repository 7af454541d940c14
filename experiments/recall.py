"""Multi-query associative recall: can the model look up what it read, and can the gate learn which tokens need to?

The task (arXiv 2312.04927, Zoology): a row shows n key-value pairs, then asks for the values of the keys in random
order among filler tokens. A state of fixed size must hold all pairs; attention can look back. The score is the
fraction of asked values that the model ranks first, on rows it has never seen.

    python -m experiments.recall --recipes mamba2 samba paper anneal-all-add --seeds 0 1 2 --minutes 8
    python -m experiments.recall --recipes anneal-all-add --capacity 0.05 0.1 0.3
    python -m experiments.recall --table

Every run (see experiments/recipes.py) becomes a line of OUT, by default runs/recall.jsonl; a call makes those that are
missing. `--table` makes Markdown and pictures of them, beside OUT. On a GPU the layers are CUDA graphs and the host
never waits for the device; `--small` is a toy for a CPU.
"""

import argparse
import sys
import time
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import hardware
from benchmarks.in_parts import make_runs, read_results
from experiments.gate_vectors import GateVectors, log_of
from experiments.recall_report import make_report
from experiments.recall_task import SMALL, Settings, make_batch, make_rows
from experiments.recipes import RECIPES, gate_options
from megatron_taipan.evaluation.calibrate import calibrate
from megatron_taipan.gate_config import GateConfig
from megatron_taipan.inference.selection_watch import gated_blocks
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import AttentionConfig, MambaConfig, ModelConfig
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.programs import exits_cleanly
from megatron_taipan.train.schedule import learning_rate

LAST = 50  # steps at the end of training over which the metrics are averaged
TOKENS_AT_ONCE = 65536  # of a scoring pass: its logits are float32 [tokens, vocab]


def pattern_of(recipe: str) -> str:
    """An attention layer among four of Mamba-2; patterns with one kind of layer give about the same size."""
    whole = {"mamba2": "M*6", "transformerpp": "A*5"}
    return whole.get(recipe, f"M*2 {RECIPES[recipe].attention} M*2")


def make_model(pattern: str, gate: dict[str, Any], s: Settings, seed: int) -> Taipan:
    config = ModelConfig(
        pattern=pattern, vocab_size=s.vocab_size, d_model=s.d_model, d_ff=s.d_ff,
        mamba=MambaConfig(d_state=s.d_state, headdim=s.headdim, chunk_size=s.chunk_size),
        attention=AttentionConfig(n_heads=s.n_heads, window=s.window),
        gate=GateConfig(**gate),
    )  # fmt: skip
    return Taipan(config, seed=seed)


def gates_of(model: Taipan) -> list[torch.nn.Module]:
    return [block.gate for block in gated_blocks(model)]


def train_recall(model: Taipan, s: Settings, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss [steps] and the layers' metrics [steps, n]; every model sees the same rows in the same order."""
    optim = OptimConfig(lr=s.lr, min_lr=0.0, warmup_steps=s.warmup)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=s.lr, weight_decay=s.weight_decay, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    rows = torch.Generator(device).manual_seed(1000 + seed)
    vectors = GateVectors(model.config, s.steps, device)
    one_document = torch.zeros(s.batch, s.seq_len, dtype=torch.int32, device=device)
    numbers = torch.arange(s.steps, device=device)
    losses, metrics = [], []
    for step in range(s.steps):
        tokens, labels = make_batch(s, rows)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, optim, s.steps)
        out = model(
            tokens, labels=labels.clamp(min=0), loss_mask=(labels >= 0).float(), seq_idx=one_document,
            samples=torch.arange(step * s.batch, (step + 1) * s.batch, device=device), step=numbers[step],
            gate=vectors.at(step),
        )  # fmt: skip
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(out.ce_loss.detach())
        metrics.append(vectors.after(out.metrics))
    return torch.stack(losses).cpu(), torch.stack(metrics).cpu()


@torch.no_grad()
def score_recall(model: Taipan, s: Settings, n_pairs: int, seed: int, device: torch.device) -> dict[str, float]:
    """Fractions on unseen rows: accuracy, the share of asked values that are ranked first; with gates also the share
    selected of all tokens, of those that ask and of the others. A model in training mode draws what it selects."""
    rows = make_rows(s, n_pairs, s.test_rows, torch.Generator().manual_seed(9000 + seed))
    tokens, labels = (t.to(device) for t in rows)
    chosen: list[Tensor] = []  # [b, l] bool, of each gate in each part
    hooks = [gate.register_forward_hook(lambda _, __, out: chosen.append(out.selected)) for gate in gates_of(model)]
    at_once = max(1, TOKENS_AT_ONCE // s.seq_len)
    best = [model(part, step=s.steps).logits.argmax(-1) for part in tokens.split(at_once)]
    for hook in hooks:
        hook.remove()
    asks = labels >= 0
    found = {"accuracy": (torch.cat(best) == labels)[asks].float().mean().item()}
    if hooks:
        gates = len(hooks)
        selected = torch.stack([torch.cat(chosen[g::gates]) for g in range(gates)])  # [gates, test_rows, l]
        found |= {
            "selected": selected.float().mean().item(),
            "asking": selected[:, asks].float().mean().item(),
            "others": selected[:, ~asks].float().mean().item(),
        }
    return {name: round(value, 4) for name, value in found.items()}


def run(what: dict, device: torch.device) -> dict:
    """Trains and scores one run of `recall_runs`."""
    s, seed = Settings(**what["settings"]), what["seed"]
    began = time.perf_counter()
    model = make_model(what["pattern"], what["gate"], s, seed).to(device)
    graphs = device.type == "cuda" and model.graphable
    if graphs:
        model.capture(s.batch, s.seq_len)
    losses, metrics = train_recall(model, s, seed, device)
    model.release_graphs()
    trained = time.perf_counter()
    model.eval()
    every = sorted({*s.pairs, *s.score_pairs})

    def scores() -> dict[int, dict[str, float]]:
        return {n: score_recall(model, s, n, seed, device) for n in every}

    result: dict[str, Any] = {
        "params": model.num_params(), "graphs": graphs, "loss": losses[-LAST:].mean().item(),
        "log": log_of(losses, metrics, model.layer_metrics), "scores": {"evaluation": scores()},
    }  # fmt: skip
    if gates_of(model):
        result["layer_metrics"] = model.layer_metrics.named(metrics[-LAST:].mean(0).tolist())
        model.train()
        result["scores"]["training"] = scores()
        model.eval()
    if gates_of(model) and model.config.gate.noise != "random":  # a threshold changes nothing there
        held_out = [make_rows(s, n, s.test_rows // 2, torch.Generator().manual_seed(7000 + seed))[0] for n in s.pairs]
        batches: list[dict[str, Any]] = [{"tokens": t.to(device), "seq_idx": None} for t in held_out]
        result["thresholds"] = calibrate(model, batches)
        result["scores"]["calibrated"] = scores()
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result | {"train_seconds": round(trained - began, 1)}


def recall_runs(options: argparse.Namespace, s: Settings) -> list[dict]:
    """The runs asked for, each once, with everything that its outcome depends on. One seed of all recipes comes first,
    so that a call that stops early leaves something to compare."""
    sweeps = [x or [None] for x in (options.capacity, options.tau, options.budget_lambda, options.window)]
    runs: list[dict] = []
    for seed, recipe, capacity, tau, budget_lambda, window in product(options.seeds, options.recipes, *sweeps):
        attention = RECIPES[recipe].attention
        sweep = {"capacity": capacity, "tau": tau, "budget_lambda": budget_lambda}
        changes = {name: value for name, value in sweep.items() if value is not None and attention == "S"}
        here = replace(s, window=window) if window and attention in "WS" else s
        what = {
            "recipe": recipe, "changes": changes, "seed": seed, "pattern": pattern_of(recipe),
            "gate": gate_options(recipe, **changes), "settings": asdict(here),
        }  # fmt: skip
        if what not in runs:  # a sweep of the gate does not change a model without one
            runs.append(what)
    return runs


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The command line, and the settings that follow from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/recall.jsonl"), help="file of the runs")
    parser.add_argument("--table", action="store_true", help="only make the tables and pictures of the runs in OUT")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME",
                        help=f"of {', '.join(RECIPES)}; default: all")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    for name in ("capacity", "tau", "budget-lambda"):
        parser.add_argument(f"--{name}", nargs="+", type=float, help="values in place of the recipe's, each in a run")
    parser.add_argument("--window", nargs="+", type=int, help="windows, each in a run; default: the whole row")
    parser.add_argument("--minutes", type=float, help="start no run that would end later, by the longest so far")
    parser.add_argument("--small", action="store_true", help="a toy for a CPU")
    for field in [f for f in fields(Settings) if f.name != "window"]:
        many = isinstance(field.default, tuple)
        kind: Any = int if many else type(field.default)
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=kind, nargs="+" if many else None, help=f"default {field.default}")
    options = parser.parse_args(arguments)
    given: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(Settings) if f.name != "window"}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    s = replace(SMALL if options.small else Settings(), **given)
    # In longer rows the same share of the tokens asks, unless --pairs is given.
    pairs = s.pairs if "pairs" in given else tuple(s.seq_len // part for part in (16, 8, 4))
    s = replace(s, window=s.seq_len, pairs=pairs)
    s.check()
    return options, s


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The program."""
    options, s = parse_arguments(arguments)
    if options.table:
        records = [r for r in read_results(options.out) if r["run"]["recipe"] in options.recipes]
        print(make_report(records, options.out))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = hardware()
    wanted = recall_runs(options, s)
    left = make_runs(options.out, wanted, lambda what, _: run(what, device) | {"about": about}, options.minutes)
    print(f"{left} of the runs asked for have no result yet", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
