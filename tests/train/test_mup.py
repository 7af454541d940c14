"""Sizes of activations over widths after a few steps, the coordinate check of arXiv 2203.03466 (appendix D.1)."""

import pytest
import torch

from megatron_taipan.config import Config
from megatron_taipan.config_errors import ConfigError
from megatron_taipan.config_loading import make_config
from megatron_taipan.engine.build import describe_width, parameter_groups
from megatron_taipan.model.gate import Gate
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parameters import parameter_table
from tests.train.toy import VOCAB, toy_tree

BASE, WIDTHS, STEPS, LR = 64, (64, 128, 256), 4, 1e-2


def configure(width: int, base: int | None, tied: bool) -> Config:
    """Heads and SwiGLU grow with the width; head size, states and groups do not. Every token attends in evaluation."""
    tree = toy_tree("no", "no", optim={"lr": LR, "min_lr": 0.0, "weight_decay": 0.1, "eps": 1e-12})
    tree["model"] |= {
        "pattern": "M A S", "d_model": width, "d_ff": 2 * width, "tie_embeddings": tied, "mup_base_width": base,
        "attention": {"n_heads": width // 16, "window": 12},
        "gate": {"capacity": 0.9, "gradient": "all", "noise": "none", "threshold": -1e9},
    }  # fmt: skip
    return make_config(tree)


def sizes(width: int, base: int | None, tied: bool) -> dict[str, float]:
    """Root mean squares of activations, of every layer's output and of what gates and head say, after STEPS."""
    config = configure(width, base, tied)
    model = Taipan(config.model, seed=1)
    groups = parameter_groups(model, parameter_table(config.model), config)
    optimizer = torch.optim.AdamW(
        [{**group, "lr": LR * group["lr_factor"]} for group in groups], betas=config.optim.betas, eps=config.optim.eps
    )
    tokens = torch.randint(0, VOCAB, (8, 33), generator=torch.Generator().manual_seed(5))
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(tokens[:, :-1], labels=tokens[:, 1:]).loss.backward()
        optimizer.step()
    found = {}

    def size(x: torch.Tensor) -> float:
        return float(x.detach().square().mean().sqrt())

    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, inputs, out, i=index: found.update({f"layer {i}": size(out[0].total())}))
    for module in model.modules():
        if isinstance(module, Gate):
            module.register_forward_hook(lambda _, inputs, out: found.update(gate=size(out.margin)))
    with torch.no_grad():
        found["logits"] = size(model.eval()(tokens[:, :-1]).logits)
    assert len(found) == 5
    return found


@pytest.mark.parametrize(("tied", "widths"), [(True, WIDTHS), (False, (WIDTHS[0], WIDTHS[-1]))])
def test_sizes_stay_flat_over_widths_with_it_and_grow_without(tied, widths):
    with_it, without = ([sizes(width, base, tied) for width in widths] for base in (BASE, None))
    for name in with_it[0]:
        flat, grown = ([found[name] for found in over] for over in (with_it, without))
        # over four times the width; what the two numbers of a gate say scatters more than means over the width do
        assert max(flat) < (2.0 if name == "gate" else 1.6) * min(flat), (name, flat)
        assert grown[-1] > (2.5 if name == "gate" else 1.8) * grown[0], (name, grown)


def test_rates_and_decay_by_names():
    """Written down: what sums over the width has a quarter of the rate at four times the width, decay a step stays."""
    config = configure(256, BASE, False)
    model = Taipan(config.model, seed=1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, parameter_table(config.model), config)
    found = {names[id(p)]: (group["lr_factor"], group["weight_decay"]) for group in groups for p in group["params"]}
    slow = ("_proj", "in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt", "gate.weight")
    for name, (factor, decay) in found.items():
        if name == "final_norm.weight":
            assert (factor, decay) == (0.25, 0.0)
        elif name.endswith(slow):
            assert (factor, decay) == (0.25, pytest.approx(0.4)), name
        else:
            assert factor == 1.0 and decay in (0.0, 0.1), name
    assert torch.equal(model.final_norm.weight, torch.full((256,), 0.25))


def test_at_the_base_width_nothing_changes():
    plain, scaled = (configure(BASE, base, False) for base in (None, BASE))
    before, after = (Taipan(config.model, seed=1) for config in (plain, scaled))
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q), name
    table = parameter_table(plain.model)
    groups = [
        [{k: v for k, v in group.items() if k != "params"} for group in parameter_groups(model, table, config)]
        for model, config in ((before, plain), (after, scaled))
    ]
    assert groups[0] == groups[1]


def test_what_it_does_is_said_and_muon_refused():
    config = configure(256, BASE, True)
    assert describe_width(config.model) == [
        "muP: 4 times the width 64: learning rate x 0.25, weight decay x 4 for matrices, gates and the final norm"
    ]
    assert describe_width(configure(256, None, True).model) == []
    tree = config.model_dump(mode="json")
    tree["optim"]["name"] = "muon"
    with pytest.raises(ConfigError, match="mup_base_width=64, whose learning rates are for AdamW"):
        make_config(tree)
