"""One layout against one process: trains a few steps through the real engine and compares everything.

The reference is the unsplit network in one process, float32, torch's AdamW, no DeepSpeed; with Muon its orthogonal
matrices come from a float64 singular value decomposition (tests/engine/exact_muon.py). Compared are: the loss of
every step, the gradient norm before clipping, every parameter's gradient at step 1 and value after step 5 (the shards
merged by the layout table), and which tokens every gate selected at every step, which must be identical.

On GPUs (NCCL) the reference runs on the first GPU. In bf16, there through the kernels, no layout equals the float32
reference, and one process does not either: a layout passes where its differences are at most three times
as large as that process's.
"""

import itertools
import math
import random
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from megatron_taipan.config import Config
from megatron_taipan.config_loading import make_config
from megatron_taipan.model.gate import Gate
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import Ops, pick_ops
from megatron_taipan.parallel.connect import connect
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.parameters import merge_shards, parameter_table
from tests.engine.exact_muon import ExactMuon, is_projection
from tests.model.replays import watched_passes
from tests.ops.interpreted import interpreted_ops

VOCAB = 97  # odd on purpose: no tensor size divides it
PATTERNS = {
    "taipan": "M*2 S M S",
    "mamba2": "M*4",
    "samba": "M*2 W M W",
    "jamba": "M*2 A M A",
    "transformerpp": "A*4",
}
CUTS = {
    # not in the middle, so that the first stage has no gate and one parameter group less in bf16
    ("taipan", 2): "M*2 | S M S",
    # the first stage's gate has its gradient by way of a stage without one
    ("taipan", 3): "M*2 S | M | S",
}
# Options of the gate, and what they are at each step, written down: C, tau, lambda, whether every query is computed.
# A fraction is of 5 steps, so that a change from 0.2 to 0.8 goes from step 1 to step 4.
GATES: dict[str, tuple[dict[str, Any], list[tuple[float, float, float, bool]]]] = {
    "paper": ({}, [(0.15, 1.0, 1.0, False)] * 5),
    "anneal": (
        {
            "capacity": {"start": 0.7, "end": 0.1, "after": 0.2, "until": 0.8},
            "tau": {"start": 1.5, "end": 0.5, "after": 0.2, "until": 0.6, "shape": "cosine"},
            "budget_lambda": {"start": 0.0, "end": 8.0, "after": 0.0, "until": 4}, "budget": "batch",
            "gradient": "sampled", "gradient_share": 0.5, "refinement": "add", "init_bias": 0.5,
        },
        [(0.7, 1.5, 0.0, False), (0.7, 1.5, 2.0, True), (0.5, 1.0, 4.0, False), (0.3, 0.5, 6.0, True),
         (0.1, 0.5, 8.0, False)],
    ),
    "layers": (
        {
            "budget": "layers", "budget_lambda": 5.0, "noise": "none", "weight": "one", "input_gradient": "none",
            "refinement": "add",
        },
        [(0.15, 1.0, 5.0, False)] * 5,
    ),
    "batch-all": (
        {"budget": "batch", "gradient": "all", "budget_lambda": 5.0, "init_bias": 1.0}, [(0.15, 1.0, 5.0, True)] * 5
    ),
}  # fmt: skip
# relative; loss1, norm1 and grad at step 1, the others over all steps
LIMITS = {"loss1": 1e-6, "norm1": 1e-6, "grad": 1e-5, "losses": 1e-5, "norm": 1e-5, "weights": 1e-5, "flips": 0.0}
# longer rows and a wider network amplify rounding more, on one process too: there float32 differs from float64 by up
# to 9e-6 in a gradient of step 1 (floors.py)
GPU_LIMITS = LIMITS | {"grad": 3e-5, "norm": 1e-3, "weights": 1e-4}
# of bf16, where one process happens to differ by less than a third of these; the losses jump with each token that a
# gate decides otherwise (by up to 2e-4 at the GPUs' sizes, floors.py)
LEAST = {"loss1": 1e-3, "norm1": 2e-3, "grad": 2e-2, "losses": 1e-3, "norm": 2e-3, "weights": 5e-4, "flips": 2e-3}

# of a network alone in bf16, the measure of the others: several times the largest of docs/parity-gpu.md and of a CPU.
# Later steps have no limit: transformerpp's norms were 0.45 off on a GPU, the losses of the gate `layers` 6e-3 on a CPU
ALONE = {"loss1": 1e-3, "norm1": 5e-3, "grad": 0.2}


@dataclass(frozen=True)
class Setting:
    """Where and how precisely the layouts compute."""

    on_gpu: bool = False
    precision: str = "fp32"  # fp32: reference operations; bf16: on a GPU the kernels
    graphs: bool = False  # layers as CUDA graphs, which say nothing about single tokens: selections are not compared
    interpreted: bool = False  # the kernels in Triton's interpreter on a CPU, float32

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")

    @property
    def ops(self) -> Ops:
        if self.interpreted:
            return interpreted_ops()
        return pick_ops("fast" if self.on_gpu and self.precision == "bf16" else "reference")

    @property
    def steps(self) -> int:
        return 1 if self.interpreted else 5

    @property
    def batch(self) -> int:
        """Rows of a step, each a micro-batch."""
        return 2 if self.interpreted else 4

    @property
    def length(self) -> int:
        """Tokens a row: for the kernels more than one of their chunks."""
        return 100 if self.interpreted else 160 if self.on_gpu else 32

    @property
    def sizes(self) -> dict[str, Any]:
        """For the kernels sizes that they take."""
        if self.on_gpu or self.interpreted:
            return {"d_model": 64, "d_ff": 96, "mamba": {"d_state": 16, "headdim": 16}, "window": 40}
        return {"d_model": 32, "d_ff": 48, "mamba": {"d_state": 8, "headdim": 8, "chunk_size": 8}, "window": 9}

    def __str__(self) -> str:
        kind = " graphs" if self.graphs else " kernels interpreted" if self.interpreted else ""
        return f"{self.precision}{kind} on {'GPUs' if self.on_gpu else 'the CPU'}"


@dataclass(frozen=True)
class Case:
    """One layout of one network."""

    pattern: str = "taipan"
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    data: int = 1
    context: int = 1
    zero: int = 1
    recompute: str = "none"
    packed: bool = True
    n_groups: int = 1
    n_kv_heads: int = 1
    micro_batch: int = 1
    gate: str = "paper"  # which of GATES
    optimizer: str = "adamw"

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def graphable(self) -> bool:
        """Whether its layers can run as CUDA graphs."""
        return self.pipeline == 1 and self.zero == 1

    def alone(self) -> "Case":
        """The same network on one process."""
        return Case(
            self.pattern, packed=self.packed, n_groups=self.n_groups, n_kv_heads=self.n_kv_heads, gate=self.gate,
            optimizer=self.optimizer,
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.pattern:13s} TP{self.tensor}{'+SP' if self.sequence else '   '} PP{self.pipeline} DP{self.data}"
            f" CP{self.context} ZeRO{self.zero} {self.recompute:9s} {'packed' if self.packed else 'plain '}"
            f" groups={self.n_groups} kv={self.n_kv_heads} micro={self.micro_batch} {self.gate} {self.optimizer}"
        )


CHOICES: dict[str, list[Any]] = {
    "pattern": list(PATTERNS),
    "tensor": [1, 2, 4],
    "sequence": [False, True],
    "pipeline": [1, 2, 3],
    "data": [1, 2],
    "context": [1, 2, 4],
    "zero": [0, 1, 2, 3],
    "recompute": ["none", "selective", "full"],
    "packed": [True, False],
    "n_groups": [1, 2, 4],
    "n_kv_heads": [1, 4],
    "micro_batch": [1, 2, 4],
    "gate": list(GATES),
}


MOST_PROCESSES = 4


def possible(case: Case) -> bool:
    """Whether the project runs it (else it is refused at start), and on at most MOST_PROCESSES."""
    if case.sequence and case.tensor == 1:
        return False
    if case.micro_batch * case.data > 4:  # of 4 rows
        return False
    if case.gate != "paper" and case.pattern != "taipan":
        return False
    if case.optimizer == "muon" and case.zero == 3:
        return False
    if case.gate == "batch-all" and (case.pipeline != 2 or not case.packed or case.tensor > 1):
        return False  # its gates' gradients cancel to what float32 rounds away, on one process too
    if case.context > 1 and case.pipeline > 1:
        return False
    return case.processes <= MOST_PROCESSES and not (case.pipeline > 1 and case.zero != 1)


def all_cases(seed: int = 0) -> list[Case]:
    """Every possible case, shuffled."""
    axes = [place for place, name in enumerate(CHOICES) if name in ("tensor", "pipeline", "data", "context")]
    few = (v for v in itertools.product(*CHOICES.values()) if math.prod(v[a] for a in axes) <= MOST_PROCESSES)
    every = [case for case in (Case(*values) for values in few) if possible(case)]
    random.Random(seed).shuffle(every)
    return every


def covering_cases(seed: int = 0) -> list[Case]:
    """CI_CASES, and then greedily the case with most new pairs, until every possible pair of choices occurs."""
    names = list(CHOICES)

    def pairs(case: Case) -> set:
        return set(itertools.combinations([(n, getattr(case, n)) for n in names], 2))

    chosen = list(CI_CASES)
    candidates = {case: pairs(case) for case in all_cases(seed)[:4000]}
    missing = set().union(*candidates.values()).difference(*(pairs(c) for c in chosen))
    while missing:
        best = max(candidates, key=lambda c: len(candidates[c] & missing))
        chosen.append(best)
        missing -= candidates[best]
    return chosen


# What the test suite runs: each tensor trick, each ZeRO stage, both kinds of recomputation, the pipeline.
CI_CASES = [
    Case("taipan", tensor=2, zero=1),
    Case("taipan", tensor=2, sequence=True, zero=1),
    Case("taipan", tensor=2, sequence=True, zero=1, recompute="selective"),  # the presets' recomputation
    Case("taipan", tensor=2, sequence=True, zero=3, recompute="selective", n_groups=2),
    Case("taipan", data=2, zero=0, recompute="full"),
    Case("taipan", data=2, zero=1),
    Case("taipan", data=2, zero=3, packed=False),
    Case("taipan", pipeline=2, zero=1, recompute="full"),
    Case("taipan", pipeline=2, zero=1, recompute="selective"),
    Case("taipan", pipeline=3, zero=1),
    Case("transformerpp", pipeline=2, zero=1, packed=False),
    Case("samba", tensor=2, zero=3, n_kv_heads=4),
    Case("jamba", tensor=2, sequence=True, zero=0, packed=False),
    Case("mamba2", data=2, zero=2, recompute="selective"),
    Case("taipan", tensor=4, zero=2),
    Case("taipan", tensor=4, zero=1, n_groups=2),
    Case("taipan", tensor=4, sequence=True, zero=3, n_kv_heads=4, n_groups=4),
    Case("taipan", tensor=2, pipeline=2, zero=1, sequence=True, recompute="selective", n_groups=1),
    Case("jamba", tensor=2, data=2, zero=2, recompute="full", n_groups=2),
    Case("taipan", tensor=2, data=2, zero=1, sequence=True, recompute="selective"),
    Case("transformerpp", tensor=4, zero=0, sequence=True),
    # schedules, a budget of the batch and sampled gradients: however the batch is split
    Case("taipan", data=2, zero=1, gate="anneal"),
    Case("taipan", data=2, zero=2, micro_batch=2, gate="anneal"),
    Case("taipan", tensor=2, sequence=True, zero=1, micro_batch=4, recompute="selective", gate="anneal"),
    Case("taipan", pipeline=2, zero=1, gate="anneal"),
    Case("taipan", pipeline=2, zero=1, micro_batch=2, recompute="selective", gate="batch-all"),
    Case("taipan", tensor=2, pipeline=2, zero=1, gate="anneal"),
    Case("taipan", tensor=2, data=2, zero=3, micro_batch=2, gate="anneal"),
    Case("taipan", pipeline=2, zero=1, gate="layers"),
    # pieces of rows: states and windows across borders, with the other axes, and full attention over four pieces
    Case("taipan", context=2, zero=1),
    Case("taipan", tensor=2, sequence=True, context=2, zero=1, recompute="selective"),
    Case("taipan", data=2, context=2, zero=2, gate="anneal"),
    Case("jamba", context=4, zero=3, n_groups=2),
    # matrices cut by data ranks, by rows and columns, and held by all tensor ranks (B, C, k and v)
    Case("taipan", data=2, zero=2, optimizer="muon"),
    Case("taipan", tensor=2, data=2, zero=1, sequence=True, optimizer="muon"),
    Case("jamba", tensor=2, zero=0, n_groups=2, n_kv_heads=4, optimizer="muon"),
]

# Muon elsewhere, besides those of CI; the optimizer does not care about the other choices.
OF_MUON = [
    Case("taipan", data=2, zero=1, optimizer="muon"),
    Case("taipan", data=2, zero=0, optimizer="muon"),
    Case("taipan", pipeline=2, zero=1, optimizer="muon"),
    Case("taipan", tensor=2, pipeline=2, zero=1, optimizer="muon"),
    Case("taipan", pipeline=2, data=2, zero=1, micro_batch=2, gate="anneal", optimizer="muon"),
    Case("taipan", tensor=4, zero=2, n_groups=2, optimizer="muon"),
    Case("taipan", tensor=2, data=2, zero=0, n_groups=4, optimizer="muon"),
    Case("transformerpp", data=4, zero=1, n_kv_heads=4, optimizer="muon"),
    Case("samba", tensor=2, data=2, zero=2, recompute="selective", optimizer="muon"),
    Case("mamba2", tensor=2, sequence=True, zero=1, optimizer="muon"),
]

# More processes than the others are drawn for.
OF_EIGHT = [
    Case("taipan", tensor=2, sequence=True, pipeline=2, data=2, zero=1),
    Case("taipan", tensor=4, sequence=True, data=2, zero=1, n_groups=2),
    Case("taipan", tensor=2, sequence=True, data=4, zero=3, recompute="selective"),
    Case("jamba", tensor=4, sequence=True, data=2, zero=2, n_groups=4, n_kv_heads=4),
    Case("taipan", tensor=2, sequence=True, data=2, context=2, zero=3, recompute="selective"),
    Case("taipan", tensor=2, sequence=True, pipeline=2, data=2, zero=1, optimizer="muon"),
]


def configure(case: Case, setting: Setting) -> Config:
    sizes, pattern = setting.sizes, CUTS.get((case.pattern, case.pipeline), PATTERNS[case.pattern])
    return make_config(
        {
            "model": {
                "pattern": pattern, "vocab_size": VOCAB, "d_model": sizes["d_model"],
                "d_ff": sizes["d_ff"], "mamba": sizes["mamba"] | {"n_groups": case.n_groups},
                "attention": {"n_heads": 4, "n_kv_heads": case.n_kv_heads, "window": sizes["window"]},
                "gate": GATES[case.gate][0],
            },
            "parallel": {
                "tensor": case.tensor, "sequence": case.sequence, "pipeline": case.pipeline, "context": case.context,
                "zero_stage": case.zero, "recompute": case.recompute, "timeout_s": 120,
            },
            "data": {"train": "unused", "seq_len": setting.length, "mask_documents": case.packed},
            # Adam's eps is large so that a weight's update is a smooth function of its gradient, however small. Muon's
            # is steep where a matrix has nearly none (3.4445^5 = 485), so its steps are small.
            "optim": {
                "name": case.optimizer, "lr": 1e-2 if case.optimizer == "adamw" else 1e-3, "eps": 1e-3,
                "grad_clip": 0.5, "weight_decay": 0.1,
            },
            "train": {
                "steps": setting.steps, "global_batch": setting.batch, "micro_batch": case.micro_batch, "seed": 3,
                "precision": setting.precision, "cuda_graphs": setting.graphs,
            },
            "checkpoint": {"dir": "unused"},
        }
    )  # fmt: skip


def make_batch(step: int, packed: bool, setting: Setting) -> dict[str, torch.Tensor]:
    """The global batch of a step; masks differ from row to row, so that a mean of means would show."""
    generator, b, length = torch.Generator().manual_seed(100 + step), setting.batch, setting.length
    tokens = torch.randint(0, VOCAB, (b, length + 1), generator=generator)
    cut = torch.randint(1, length, (b, 1), generator=generator)
    seq_idx = (torch.arange(length) >= cut).int() if packed else torch.zeros(b, length, dtype=torch.int32)
    mask = (torch.rand(b, length, generator=generator) < torch.linspace(0.3, 1.0, b)[:, None]).float()
    batch = {
        "tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "seq_idx": seq_idx,
        "sample": torch.arange(step * b, (step + 1) * b),
    }  # fmt: skip
    return {name: value.to(setting.device) for name, value in batch.items()}


def own_piece(batch: dict[str, torch.Tensor], groups: Groups) -> dict[str, torch.Tensor]:
    """This rank's tokens of every row, as the loader gives them."""
    if groups.context is None:
        return batch
    rank, length = groups.context.rank, batch["tokens"].shape[1] // groups.context.size
    seq_idx = batch["seq_idx"]
    start = (seq_idx < seq_idx[:, rank * length, None]).sum(1)  # tokens of earlier documents
    piece = {n: t if n == "sample" else t[:, rank * length :][:, :length] for n, t in batch.items()}
    return piece | {"document_start": start}


@dataclass
class Trace:
    """What a run did."""

    losses: list[float]
    norms: list[float]
    grads: dict[str, torch.Tensor]  # step 1, after clipping
    weights: dict[str, torch.Tensor]  # after the last step
    selections: dict[tuple[int, int, int, int], bytes]  # (step, sample, layer, first position) -> which tokens


def watch_gates(model: torch.nn.Module, into: dict, now: dict[str, Any]) -> None:
    """Notes every gate's selections under (step, sample, layer, position of the first token)."""

    def note(gate: Gate, arguments: tuple, selection: Any) -> None:
        if gate.training:
            now.setdefault("m", []).append(selection.m)
            ctx = arguments[1]
            for row, sample in enumerate(ctx.samples.tolist()):
                into[now["step"], sample, gate.layer, ctx.begin] = bytes(selection.selected[row].tolist())

    for module in model.modules():
        if isinstance(module, Gate):
            module.register_forward_hook(note)


@cache
def reference(case: Case, setting: Setting) -> Trace:
    """One process, the whole network, no DeepSpeed, float32.

    Args:
        case: alone, a network without a layout.
    """
    packed, config = case.packed, configure(case, setting)
    model = Taipan(config.model, seed=config.train.seed, ops=pick_ops("reference")).to(setting.device)
    table = parameter_table(config.model)
    o, muon = config.optim, [p for n, p in model.named_parameters() if case.optimizer == "muon" and is_projection(n)]
    by_adamw = [(n, p) for n, p in model.named_parameters() if not any(p is m for m in muon)]
    decayed = [p for n, p in by_adamw if table[n].decay]
    others = [p for n, p in by_adamw if not table[n].decay]
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    matrices = ExactMuon(muon, lr=o.lr, weight_decay=o.weight_decay)
    trace, now = Trace([], [], {}, {}, {}), {"step": 0}
    watch_gates(model, trace.selections, now)
    budget = config.model.gate.budget
    shares = [0.0] * config.model.letters.count("S")
    for step in range(setting.steps):
        capacity, tau, weight, every = GATES[case.gate][1][step]
        now |= {"step": step, "m": []}
        batch = make_batch(step, packed, setting)
        seq_idx = batch["seq_idx"] if packed else None
        out = model(
            batch["tokens"], labels=batch["labels"], loss_mask=batch["loss_mask"], seq_idx=seq_idx,
            samples=batch["sample"], step=step,
            gate=torch.tensor([capacity, tau, weight, every, *shares], device=setting.device),
        )  # fmt: skip
        loss, shown = out.loss, out.loss.item()
        if (
            budget != "row"
        ):  # (C - share)^2 of the whole batch, its derivative with the share of the step before (C at first)
            now_selected = [m.mean() for m in now["m"]]
            if budget == "layers":  # one share of all layers
                now_selected = [sum(now_selected) / len(now_selected)]
                shares = [sum(shares) / len(shares)]
            before = shares if step else [capacity] * len(shares)
            loss = out.ce_loss + weight * sum(2 * (b - capacity) * m for b, m in zip(before, now_selected, strict=True))
            shares = [m.item() for m in now_selected] * (len(now["m"]) if budget == "layers" else 1)
            shown = out.ce_loss.item() + weight * sum((capacity - m.item()) ** 2 for m in now_selected)
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        if step == 0:
            trace.grads = {n: p.grad.cpu().clone() for n, p in model.named_parameters()}
        optimizer.step()
        matrices.step()
        trace.losses.append(shown)
        trace.norms.append(norm.item())
    trace.weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}
    return trace


def run_cases(cases: list[Case], setting: Setting, floors: list[dict | None]) -> list[dict[str, Any]]:
    """Runs in every process of a launch; rank 0's results count.

    Args:
        floors: for each case the result of the same network alone in the same setting, where it is the measure.
    """
    torch.set_num_threads(1)
    made: dict[tuple, Groups] = {}
    return [run_case(case, setting, floor, made) for case, floor in zip(cases, floors, strict=True)]


def run_case(case: Case, setting: Setting, floor: dict | None, made: dict[tuple, Groups]) -> dict[str, Any]:
    """Trains the case and compares; {} on ranks other than 0."""
    from megatron_taipan.engine.build import build_engine, capture_graphs, check_layout
    from megatron_taipan.train.schedule import gate_step
    from megatron_taipan.train.start import build_training_model
    from megatron_taipan.train.step import train_step

    config = configure(case, setting)
    check_layout(config, dist.get_world_size())
    key, size = (case.tensor, case.sequence, case.pipeline, case.context), case.micro_batch
    if key not in made:
        made[key] = connect(config.parallel, setting.device, setting.length)[0]
    groups = made[key]
    trace, now = Trace([], [], {}, {}, {}), {"step": 0}
    model = build_training_model(config, groups, setting.ops)
    if not setting.graphs:
        watch_gates(model, trace.selections, now)
    engine = build_engine(model, config, groups, setting.device)
    graphs = ExitStack()
    if setting.graphs:
        report = capture_graphs(model, config, setting.device, graphs)
        assert "CUDA graphs" in report, report
        passes = graphs.enter_context(watched_passes())
    per_rank = setting.batch // groups.data_size // size
    shares: list[float] = []
    gates = config.model.letters.count("S")
    for step in range(setting.steps):
        now |= {"step": step, "m": []}
        batch = own_piece(make_batch(step, case.packed, setting), groups)
        rows = [(k * groups.data_size + groups.data_rank) * size for k in range(per_rank)]
        micro = [{name: value[row : row + size] for name, value in batch.items()} for row in rows]
        gate = gate_step(config.model.gate, step, config.train.steps, shares, gates)
        result = train_step(engine, micro, step=step, groups=groups, grad_clip=config.optim.grad_clip, gate=gate)
        shares = model.layer_metrics.of_gates(result.layer_metrics, "selected")
        trace.losses.append(result.loss)
        trace.norms.append(result.grad_norm)
        if step == 0:
            # the first moment after one step is (1 - beta1) times the gradient, at every ZeRO stage
            trace.grads = collect(engine, model, groups, config, moment=True)
    trace.weights = collect(engine, model, groups, config, moment=False)
    if setting.graphs:
        assert len(passes.replayed) == setting.steps * per_rank and not passes.one_by_one, passes
    graphs.close()
    engine.destroy()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, trace.selections)
    if dist.get_rank():
        return {}
    limits = GPU_LIMITS if setting.on_gpu or setting.interpreted else LIMITS  # the same sizes
    if setting.precision == "bf16":
        limits = {name: max(least, 3 * floor[name]) for name, least in LEAST.items()} if floor else ALONE
    return compare(trace, everyone, reference(case.alone(), setting), limits)


def join_pieces(selections: dict) -> dict:
    """The selections of whole rows, under the position 0."""
    rows: dict = {}
    for step, sample, layer, begin in sorted(selections):
        whole = step, sample, layer, 0
        rows[whole] = rows.get(whole, b"") + selections[step, sample, layer, begin]
    return rows


def collect(engine: Any, model: Any, groups: Groups, config: Config, *, moment: bool) -> dict[str, torch.Tensor]:
    """Every parameter's gradient of step 1 or value, full: parts joined by DeepSpeed, tensor shards by the table."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    o = config.optim
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed 0.19 links the moments once the first parameter group has them; again, now that all have
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    ours = {}
    for name, parameter in model.named_parameters():
        if engine.zero_optimization_stage() == 0:
            value = engine.optimizer.state[parameter]["exp_avg"] if moment else parameter
        elif moment:
            value = safe_get_full_optimizer_state(parameter, "exp_avg")
        else:
            value = safe_get_full_fp32_param(parameter)
        beta = 0.0 if not moment else o.muon_momentum if o.name == "muon" and is_projection(name) else o.betas[0]
        ours[name] = value.detach().cpu().clone().float() / (1 - beta)
    mine = (groups.tensor.rank, ours) if groups.zero_rank == 0 else None
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    table = parameter_table(config.model, groups.tensor.size)
    full = {}
    for name, spec in table.items():
        held = [(rank, shards[name]) for rank, shards in filter(None, everyone) if name in shards]
        copies = [[t for rank, t in held if rank == r] for r in range(groups.tensor.size)]
        for same in copies:  # a tied weight lives on two stages: both must agree
            assert all(torch.equal(t, same[0]) for t in same), f"{name} differs between stages"
        if spec.split is None:
            assert all(torch.allclose(t, held[0][1], rtol=1e-5, atol=1e-8) for _, t in held), (
                f"{name} differs over ranks"
            )
        shape = spec.local_shape(groups.tensor.size)
        full[name] = merge_shards([same[0].view(shape) for same in copies], spec)
    return full


def compare(trace: Trace, selections: list[dict], want: Trace, limits: dict[str, float]) -> dict[str, Any]:
    """Relative differences, the worst of each kind; `failed` names what exceeds its limit.

    Args:
        selections: what each rank saw its gates select; nothing from any of them where graphs hid it.
    """

    def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        # What happens to cancel to nearly nothing is measured against 1e-4 of the whole: such a sum of 128 tokens, a
        # gate's bias with 1e-6 of the gradient, is 6e-4 from float64 on one process.
        least = 1e-4 * torch.stack([t.norm() for t in theirs.values()]).norm()
        errors = [((ours[n] - t).norm() / t.norm().clamp_min(least)).item() for n, t in theirs.items()]
        return max(zip(errors, theirs, strict=True))

    def relative(ours: list[float], theirs: list[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))

    grad, grad_name = worst(trace.grads, want.grads)
    weight, weight_name = worst(trace.weights, want.weights)
    result = {
        "loss1": relative(trace.losses[:1], want.losses[:1]), "losses": relative(trace.losses, want.losses),
        "norm1": relative(trace.norms[:1], want.norms[:1]), "norm": relative(trace.norms, want.norms),
        "grad": grad, "weights": weight,
        "worst": f"{grad_name}, {weight_name}",
    }  # fmt: skip
    seen: dict = {}
    for part in selections:
        for key, value in part.items():
            assert seen.setdefault(key, value) == value, f"ranks select differently at {key}"
    seen = join_pieces(seen)
    if seen:
        assert seen.keys() == want.selections.keys(), "gates ran for other steps, samples or layers"
        pairs = [(seen[key], value) for key, value in want.selections.items()]
        flips = sum(a != b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
        result["flips"] = flips / sum(len(theirs) for _, theirs in pairs)
        result["selections"] = f"{sum(a == b for a, b in pairs)}/{len(pairs)}"
    else:
        result |= {"flips": 0.0, "selections": "not seen" if want.selections else "0/0"}
    result["failed"] = [name for name, limit in limits.items() if not result[name] <= limit]
    return result
