"""Which options make another run of a checkpoint, and which may change on a resume."""

import pytest

from megatron_taipan.checkpoint.metadata import identity, identity_differences, refuse_other_run
from megatron_taipan.config_loading import make_config
from megatron_taipan.errors import UserError
from tests.train.toy import toy_tree


def changed(section: str, option: str, value) -> dict:
    """The identity of the toy run with one option changed."""
    tree = toy_tree("data", "run")
    place = tree[section]
    *path, last = option.split(".")
    for name in path:
        place = place.setdefault(name, {})
    place[last] = value
    return identity(make_config(tree), "data's fingerprint")


BEFORE = changed("train", "steps", 6)


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("train", "seed", 99),
        ("train", "precision", "bf16"),
        ("data", "seed", 99),
        ("data", "seq_len", 64),
        ("data", "mask_documents", False),
        ("model", "norm_eps", 1e-3),
        ("model", "attention.window", 5),
        ("model", "gate.refinement", "add"),
        ("model", "pattern", "M M S A"),
    ],
)
def test_what_would_be_another_run_is_refused_by_its_name(section, option, value):
    now = changed(section, option, value)
    (found,) = identity_differences(BEFORE, now)
    assert found.startswith(f"{section}.{option}: checkpoint has ") and found.endswith(f", this run {value}")
    with pytest.raises(UserError, match="checkpoint PLACE belongs to another run"):
        refuse_other_run("PLACE", BEFORE, now)


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("train", "steps", 99),
        ("train", "global_batch", 16),
        ("optim", "lr", 2e-2),
        ("parallel", "zero_stage", 3),
        ("model", "gate.threshold", 0.5),
        ("model", "gate.capacity", {"start": 0.5, "end": 0.1}),
        ("model", "mamba.chunk_size", 8),
        ("model", "pattern", "(M S) M | A"),
    ],
)
def test_what_may_change_is_not(section, option, value):
    refuse_other_run("PLACE", BEFORE, changed(section, option, value))


def test_other_data_is_another_run():
    config = make_config(toy_tree("data", "run"))
    (found,) = identity_differences(BEFORE, identity(config, "another"))
    assert found == "data.fingerprint: checkpoint has data's fingerprint, this run another"
