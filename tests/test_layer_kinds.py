"""A kind of layer is one record: this file alone adds one, gated linear attention, which then does all that layers do.

It trains on one rank, two tensor ranks and two pipeline stages, is counted, logged, saved, resharded and decodes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints.reshard import Target, reshard
from megatron_taipan.config_loading import make_config
from megatron_taipan.engine.build import check_layout
from megatron_taipan.errors import UserError
from megatron_taipan.layer_kinds.common import norm
from megatron_taipan.layer_kinds.record import LayerKind, Split
from megatron_taipan.layer_kinds.registry import KINDS, kind_of, register
from megatron_taipan.model.blocks import Block
from megatron_taipan.model.flops import layer_flops, layer_params, pipeline_bounds
from megatron_taipan.model.layers import StreamNorm
from megatron_taipan.model.stream import Measured, Stream
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.traffic import expected_traffic
from megatron_taipan.param_spec import ParamSpec
from megatron_taipan.parameters import parameter_table
from megatron_taipan.pattern import parse_pattern
from tests.distributed.launch import launch
from tests.model.small import close, documents, small_config, small_model, tokens
from tests.train.runs import log, runs
from tests.train.toy import toy_tree, write_data

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "g_proj")


def parameters(config, tensor):
    d = config.d_model
    table = {f"linear.{name}": ParamSpec((d, d), "linear", split=0) for name in PROJECTIONS}
    return {"norm.weight": norm(d), **table, "linear.out_proj": ParamSpec((d, d), "linear_residual", split=1)}


def traffic(sent):
    sent.norm()
    sent.into_block()
    sent.input_for_weights()
    sent.out_of_block()


def check(config):
    if config.d_model % config.attention.n_heads:
        raise ValueError("heads do not divide the width")


GATED_LINEAR = LayerKind(
    letter="L", mixer="gated linear attention", noun="layer", parameters=parameters,
    flops=lambda config, seq_len: 10.0 * config.d_model**2 + 5 * config.d_model**2 / config.attention.n_heads,
    check=check, splits=lambda config: (Split("model.attention.n_heads", config.attention.n_heads),),
    traffic=traffic, options=("attention.n_heads",), metrics=("forget", "state_norm"),
)  # fmt: skip
register(GATED_LINEAR)


@dataclass
class LinearState:
    """The sum of gated outer products, [b, h, e, e]."""

    sums: Tensor

    def forget(self, rows):
        self.sums = torch.where(rows[:, None, None, None], 0, self.sums)

    def select(self, index):
        self.sums = self.sums[index]

    def reserve(self):
        pass

    def to(self, device):
        self.sums = self.sums.to(device)
        return self

    def tensors(self):
        return (self.sums,)


class GatedLinear(torch.nn.Module):
    """S_t = sigmoid(g_t) * S_(t-1) + k_t v_t^T, y_t = q_t S_t; the first token of a document begins at zero."""

    def __init__(self, build, prefix):
        super().__init__()
        self.tp, self.heads = build.tp, build.config.attention.n_heads // build.tp.size
        build.parameters(self, prefix)

    def forward(self, u, ctx, state=None):
        """The output, and metrics of this rank's heads: means of 1 - sigmoid(g) and of the last state's norm."""
        parts = self.tp.column_parallel_linear(u, *(getattr(self, name) for name in PROJECTIONS))
        q, k, v, g = (p.view(ctx.batch, ctx.length, self.heads, -1) for p in parts)  # [b, l, h, e]
        sums = state.sums if state else q.new_zeros(ctx.batch, self.heads, q.shape[-1], q.shape[-1])
        first = torch.zeros(ctx.batch, ctx.length, dtype=torch.bool)
        if ctx.seq_idx is not None:
            first[:, 1:] = ctx.seq_idx[:, 1:] != ctx.seq_idx[:, :-1]
        out = []
        for t in range(ctx.length):
            kept = torch.where(first[:, t, None, None, None], 0, sums)
            sums = g[:, t].sigmoid()[..., None] * kept + k[:, t, :, :, None] * v[:, t, :, None]
            out.append(torch.einsum("bhe,bhef->bhf", q[:, t], sums))
        if ctx.single:
            state.sums.copy_(sums)
        elif state is not None:
            state.sums = sums
        y = torch.stack(out, 1).flatten(-2)
        y = y if ctx.single or not self.tp.sequence_parallel else y.flatten(0, 1)
        metrics = torch.stack([(1 - g.sigmoid()).mean(), sums.flatten(-2).norm(dim=-1).mean()])
        return self.tp.row_parallel_linear(y, self.out_proj), metrics


class GatedLinearBlock(Block, kinds=(GATED_LINEAR,)):
    def __init__(self, build, prefix, layer):
        super().__init__(build, prefix, layer)
        self.norm, self.linear = StreamNorm(build, f"{prefix}.norm"), GatedLinear(build, f"{prefix}.linear")

    def forward(self, stream, ctx, state=None):
        u, h = self.norm(*stream)
        out, metrics = self.linear(u, ctx, state)
        return Stream(h, out), Measured(metrics)

    def new_state(self, batch, device, dtype):
        e = self.config.d_model // self.config.attention.n_heads
        return LinearState(torch.zeros(batch, self.linear.heads, e, e, device=device, dtype=dtype))


def test_it_is_counted():
    config = small_config("M L S")
    d = config.d_model
    assert layer_params(config, 1) == d + 5 * d * d
    assert layer_flops(config, "L", 64) == 10.0 * d * d + 5 * d * d / 4
    assert Taipan(config).num_params() == sum(p.numel() for p in Taipan(config).parameters())
    assert pipeline_bounds(config, 64, 2)[0] == 0 and config.gated_layers == [2]
    sent = expected_traffic(config, tensor=2, sequence=False, batch=1, length=8, selected=[3])
    without = expected_traffic(small_config("M S"), tensor=2, sequence=False, batch=1, length=8, selected=[3])
    assert sent.calls["all_reduce"] == without.calls["all_reduce"] + 2


def test_it_decodes_as_it_reads():
    model = small_model("M L W").eval()
    ids, seq_idx = tokens(1, 14), documents(5, 9)
    whole = model(ids, seq_idx=seq_idx).logits
    cache = model.new_cache(1, dtype=torch.float64)
    first = model(ids[:, :7], seq_idx=seq_idx[:, :7], cache=cache).logits
    rest = [model.step(ids[:, t : t + 1], cache)[:, None] for t in range(7, 14)]
    close(torch.cat([first, *rest], 1), whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    """Five steps on one rank with a checkpoint after three, and the configuration."""
    folder = tmp_path_factory.mktemp("kinds")
    model = {
        "pattern": "M L S", "vocab_size": 64, "d_model": 32, "d_ff": 48, "attention": {"n_heads": 2, "window": 12},
        "mamba": {"d_state": 16, "headdim": 16, "chunk_size": 16},
    }  # fmt: skip
    tree = toy_tree(
        write_data(folder / "data"), folder / "one", model=model,
        train={"steps": 5, "global_batch": 4, "micro_batch": 2, "precision": "fp32", "eval_every": 0,
               "eval_samples": 3},
        checkpoint={"dir": str(folder / "one"), "save_every": 3},
    )  # fmt: skip
    assert launch(1, train_here, [tree]) == [[0]]
    return folder, tree


def train_here(trees: list[dict]) -> list:
    """In a process of its own, which has imported this file and so knows the kind."""
    return runs(trees)


def test_it_trains_and_is_logged_alike_in_every_layout(trained):
    """On two tensor ranks from a resharded checkpoint, and in two pipeline stages from the start."""
    folder, tree = trained
    alone = log(folder / "one")
    assert len(alone) == 5 and alone[-1]["loss"] < alone[0]["loss"]
    two, staged = (
        tree | {"parallel": {**tree["parallel"], **layout}, "checkpoint": {"dir": str(folder / name), "save_every": 0}}
        for name, layout in (("two", {"tensor": 2}), ("staged", {"pipeline": 2}))
    )
    reshard(folder / "one" / "step_00000003", folder / "two", Target(make_config(two), 2))
    assert launch(2, train_here, [two, staged]) == [[0, 0], [0, 0]]
    for name, expected in (("two", alone[3:]), ("staged", alone)):
        records = log(folder / name)
        for key in ("loss", "layers.1.forget", "layers.1.state_norm", "layers.2.selected", "layers.2.budget"):
            values = [[record[key] for record in rows] for rows in (records, expected)]
            assert values[0] == pytest.approx(values[1], rel=1e-5), (name, key)
    assert "layers.1.forget" in log(folder / "one", "valid")[0] and "layers.0.forget" not in alone[0]
    assert 0.4 < alone[0]["layers.1.forget"] < 0.6 and alone[0]["layers.1.state_norm"] > 0


def test_metrics_are_those_of_the_layer_by_itself():
    model, kept = small_model("M L S"), []
    model.layers[1].linear.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    measured = model.named_metrics(model(tokens(2, 9), labels=tokens(2, 9, 1)))
    gates = kept[0] @ model.layers[1].linear.g_proj.T
    assert measured["layers.1.forget"].item() == pytest.approx((-gates).sigmoid().mean().item(), rel=1e-6)
    assert list(measured)[:3] == ["layers.1.forget", "layers.1.state_norm", "layers.2.selected"]


def test_a_metric_that_is_not_given_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setitem(KINDS, "L", replace(GATED_LINEAR, metrics=("forget", "state_norm", "more")))
    model = small_model("L M")
    with pytest.raises(ValueError, match=r"layers.0 gave metrics of shape \[2\], .* declares 3 \(forget, .*, more\)"):
        model(tokens(1, 4))
    monkeypatch.setitem(KINDS, "M", replace(KINDS["M"], metrics=("state_norm",)))
    with pytest.raises(ValueError, match=r"layers.0 gave metrics of shape \[\], .* declares 1 \(state_norm\)"):
        small_model("M")(tokens(1, 4))


def test_a_letter_that_no_kind_has_is_an_error_everywhere():
    config = small_config("M")
    with pytest.raises(UserError, match="unknown layer 'Q'; known are M "):
        parse_pattern("M Q")
    for ask in (kind_of, lambda letter: layer_flops(config, letter, 8)):
        with pytest.raises(UserError, match="unknown layer 'Q'"):
            ask("Q")


def test_letters_stand_for_one_kind():
    with pytest.raises(ValueError, match="already means a Mamba-2 block"):
        register(replace(GATED_LINEAR, letter="M"))
    with pytest.raises(ValueError, match="is one letter"):
        register(replace(GATED_LINEAR, letter="LL"))
    assert set(KINDS) == set("MSWAL")


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="heads do not divide the width"):
        small_config("L", attention={"n_heads": 7})
    with pytest.raises(UserError, match=r"parallel.tensor=3 does not divide model.attention.n_heads=4"):
        parameter_table(small_config("L"), 3)


def test_a_kind_that_says_nothing_about_pieces_of_rows_gets_none():
    tree = toy_tree("unused", "unused", model={"pattern": "M L"}, parallel={"context": 2})
    with pytest.raises(UserError, match="parallel.context=2: gated linear attention layers need whole rows"):
        check_layout(make_config(tree), 2)
