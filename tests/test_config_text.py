"""The configuration written out, and the table of its options."""

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.config_loading import load_config, make_config
from megatron_taipan.config_text import describe_options, dump_config
from tests.config_tree import tree


def leaves():
    """Options of several types with values that they take."""
    return st.fixed_dictionaries(
        {},
        optional={
            "optim__lr": st.floats(1e-4, 10.0),
            "optim__eps": st.floats(1e-30, 1e-3),
            "optim__betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
            "model__gate": st.fixed_dictionaries({"threshold": st.floats(-1e9, 1e9)}),
            "model__attention": st.sampled_from([{"n_kv_heads": None}, {"n_kv_heads": 4}, {"window": 1}]),
            "train__seed": st.integers(0, 2**62),
            "checkpoint__load": st.sampled_from([None, "auto", "null", "1e5", "on", "a: b", "ä"]),
            "name": st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=10),
        },
    )


@settings(max_examples=50)
@given(leaves())
def test_a_dumped_configuration_loads_as_the_same(tmp_path_factory, changes):
    config = make_config(tree(model__mamba={"headdim": 16}, **changes))
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_a_dump_spells_out_every_option_and_every_option_has_a_meaning():
    dumped = yaml.safe_load(dump_config(make_config(tree(model__mamba={"headdim": 16}))))
    for name, default, meaning in describe_options():
        node = dumped
        for part in name.split("."):
            assert part in node, name
            node = node[part]
        assert len(meaning) > 5 and default, name
