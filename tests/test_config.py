"""The configuration: reading, overrides, and errors that name the key and show the numbers."""

import copy
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.config import (
    ConfigError,
    ModelConfig,
    ParallelConfig,
    describe_options,
    dump_config,
    load_config,
    make_config,
    refuse_unexpanded,
)
from megatron_taipan.errors import UserError, divisors
from megatron_taipan.gate_config import Schedule

TREE = {
    "model": {"pattern": "M S", "vocab_size": 100, "d_model": 48, "d_ff": 64},
    "data": {"train": "some/where"},
    "train": {"steps": 10, "global_batch": 8},
    "checkpoint": {"dir": "runs/x"},
}


def tree(**changes) -> dict:
    """TREE with dotted changes, a dot written as two underscores."""
    out = copy.deepcopy(TREE)
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return out


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree(model__d_model=96)))
    return tmp_path / "c.yaml"


def test_a_short_file_gets_the_papers_defaults(path):
    config = load_config(path)
    assert (config.model.gate.capacity, config.model.gate.tau, config.model.gate.threshold) == (0.15, 1.0, 0.0)
    assert config.model.attention.window == 2048 and config.model.gate.gradient == "selected"
    mamba = config.model.mamba
    assert (mamba.d_state, mamba.headdim, mamba.expand, mamba.n_groups, mamba.d_conv) == (128, 64, 2, 1, 4)
    assert (mamba.chunk_size, mamba.conv_bias, mamba.a_init, mamba.dt_init) == (256, True, (1, 16), (1e-3, 0.1))
    optim = config.optim
    assert (optim.lr, optim.min_lr, optim.warmup_steps, optim.weight_decay) == (5e-4, 1e-5, 2000, 0.01)
    assert (optim.betas, optim.grad_clip, config.data.seq_len) == ((0.9, 0.95), 1.0, 4096)
    assert [(s.prefix, s.weight) for s in config.data.train] == [("some/where", 1.0)]


def test_overrides_are_yaml_and_win_over_the_file(path):
    config = load_config(
        path,
        [
            "train.steps=25",
            "optim.lr=3e-4",
            "optim.min_lr=1e-6",
            "model.gate.gradient=all",
            "model.tie_embeddings=false",
            "model.attention.n_kv_heads=null",
            "optim.betas=[0.8, 0.9]",
            "data.train=[a, {prefix: b, weight: 3}]",
            "name=a=b",
        ],
    )
    assert (config.train.steps, config.optim.lr, config.optim.min_lr) == (25, 3e-4, 1e-6)
    assert config.model.gate.gradient == "all" and config.model.tie_embeddings is False
    assert config.optim.betas == (0.8, 0.9) and config.name == "a=b"
    assert [(s.prefix, s.weight) for s in config.data.train] == [("a", 1.0), ("b", 3.0)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", ["train.steps", "section.key=value"]),
        ("=3", ["section.key=value"]),
        ("train.steps.x=3", ["train.steps is a value", "train.steps=..."]),
        ("train.steps=[1", ["YAML"]),
        ("train.stepz=3", ["train.stepz", "did you mean train.steps?"]),
        ("model.gate.capasity=0.1", ["model.gate.capasity", "did you mean model.gate.capacity?"]),
        ("modle.d_model=3", ["modle", "did you mean model?"]),
        ("model.window=3", ["model.window", "model.attention.window"]),
        ("data.train=[{prefix: a, wait: 2}]", ["wait", "weight"]),
        ("train.steps=0", ["train.steps=0"]),
        ("train.steps=many", ["train.steps='many'"]),
        ("model.gate.capacity=1.5", ["model.gate.capacity: 1.5", "between 0 and 1"]),
        ("model.gate.capacity={start: 0.5, end: 1.5}", ["model.gate.capacity: 1.5", "between 0 and 1"]),
        ("model.gate.capacity={strat: 0.5, end: 0.1}", ["model.gate.capacity.start is required", "did you mean"]),
        ("model.gate.tau={start: 1, end: 0}", ["model.gate.tau: 0", "greater than 0"]),
        ("model.gate.budget_lambda=-1", ["model.gate.budget_lambda: -1", "at least 0"]),
        ("model.gate.tau={start: 1, end: 2, until: 1}", ["model.gate.tau: until=1", "write 1.0"]),
        ("model.gate.tau={start: 1, end: 2, after: 0.7, until: 0.2}", ["until=0.2", "before after=0.7"]),
        ("model.gate.tau={start: 1, end: 2, until: 10.5}", ["until=10.5", "whole step"]),
        ("model.gate.tau={start: 1, end: 2, shape: sine}", ["model.gate.tau.shape", "cosine"]),
        ("model.gate.capacity=much", ["model.gate.capacity='much'", "number"]),
        ("train.precision=fp8", ["train.precision", "bf16"]),
        ("optim.min_lr=1.0", ["min_lr=1.0", "lr=0.0005"]),
        ("model.pattern=M X", ["'X'", "^"]),
        ("data.valid=[]", ["data.valid=[]", "at least 1"]),
        ("optim.betas=[0.9, 1.5]", ["optim.betas", "1.5", "[0, 1)"]),
        ("model.mamba.a_init=[-1, 16]", ["model.mamba.a_init", "-1.0", "0 < low"]),
        ("model.mamba.dt_init=[0.1, 0.001]", ["model.mamba.dt_init", "low <= high"]),
        ("parallel.timeout_s=.inf", ["parallel.timeout_s=inf", "finite"]),
        ("checkpoint.dir=runs/try #2", ["' #' is a comment", "checkpoint.dir='\"...\"'"]),
    ],
)
def test_wrong_overrides_say_what_and_what_was_meant(path, override, words):
    with pytest.raises(UserError) as raised:
        load_config(path, [override])
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_number_sign_within_a_value_is_no_comment(path):
    for text in ("'runs/try #2'", '"runs/try #2"', "runs/try#2"):
        assert load_config(path, [f"checkpoint.dir={text}"]).checkpoint.dir == text.strip("'\"")


@pytest.mark.parametrize("folder", ["~/runs", "$HOME/runs", "${SCRATCH}/runs"])
def test_a_run_is_not_saved_in_a_folder_named_as_a_variable(path, folder):
    """No shell reads a file, and bash leaves `~` alone in `checkpoint.dir=~/runs`."""
    with pytest.raises(UserError, match=re.escape(f"checkpoint.dir={folder}: ")):
        refuse_unexpanded(load_config(path, [f"checkpoint.dir={folder}"]))
    for other in (f"./{folder}", "runs/~", "/scratch/a$b"):
        refuse_unexpanded(load_config(path, [f"checkpoint.dir={other}"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__mamba": {"headdim": 36}}, ["headdim=36", "2 * 48 = 96", "remainder 24"]),
        ({"model__mamba": {"headdim": 16, "n_groups": 4}}, ["n_groups=4", "6 SSM heads", "1, 2, 3, 6"]),
        ({"model__attention": {"n_heads": 5}}, ["n_heads=5", "d_model=48", "48 % 5 = 3"]),
        ({"model__attention": {"n_kv_heads": 5}}, ["n_kv_heads=5", "12 % 5 = 2", "1, 2, 3, 4, 6, 12"]),
        ({"model__pattern": "A", "model__attention": {"n_heads": 16}}, ["even head size", "3"]),
        ({"train__micro_batch": 3}, ["micro_batch=3", "global_batch=8", "remainder 2"]),
        ({"parallel__zero_stage": 0}, ["precision=bf16", "zero_stage=0"]),
        ({"parallel": {"pipeline": 2, "zero_stage": 2}}, ["pipeline=2", "zero_stage=2"]),
    ],
)
def test_sizes_that_do_not_fit_show_the_arithmetic(changes, words):
    changes = {"model__mamba": {"headdim": 16}} | changes
    with pytest.raises(ConfigError) as raised:
        make_config(tree(**changes))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_sizes_of_layers_that_the_pattern_lacks_are_not_checked():
    make_config(tree(model__pattern="W", model__mamba={"headdim": 36}))
    make_config(tree(model__pattern="M", model__mamba={"headdim": 16}, model__attention={"n_heads": 5}))


def test_several_faults_come_together_on_one_line():
    with pytest.raises(ConfigError) as raised:
        make_config(tree(train__stepz=1, train__steps="x", model__mamba={"headdim": 16, "d_state": 0}))
    message = str(raised.value)
    assert all(word in message for word in ("train.stepz", "train.steps='x'", "model.mamba.d_state=0"))
    assert "\n" not in message


def test_missing_sections_and_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="model is required"):
        make_config({k: v for k, v in TREE.items() if k != "model"})
    with pytest.raises(ConfigError, match="no.yaml"):
        load_config(tmp_path / "no.yaml")
    for text, word in (("- a\n- b", "mapping"), ("a: [", "YAML"), ("", "mapping")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=word):
            load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\x80\x02}")  # some other file, given by mistake
    with pytest.raises(UserError, match="not text"):
        load_config(tmp_path / "c.yaml")


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


def test_values_are_checked_on_assignment_too():
    config = make_config(tree(model__mamba={"headdim": 16}))
    with pytest.raises(ValueError):
        config.train.steps = -1
    with pytest.raises(ValueError):
        config.train.stepz = 1


@given(st.integers(1, 500))
def test_divisors(n):
    assert divisors(n) == ", ".join(str(d) for d in range(1, 65) if d <= n and n % d == 0)


def test_derived_sizes():
    config = ModelConfig.model_validate(tree(model__pattern="M | S", model__mamba={"headdim": 16})["model"])
    assert (config.letters, config.cuts, config.n_layers) == ("MS", (1,), 2)
    assert (config.d_inner, config.mamba_heads, config.n_kv_heads, config.head_dim) == (96, 6, 12, 4)


@pytest.mark.parametrize(
    ("tensor", "sequence", "seq_len", "sharded"),
    [(2, None, 64, True), (2, None, 63, False), (1, None, 64, False), (1, True, 64, False), (2, False, 64, False),
     (2, True, 63, True)],
)  # fmt: skip
def test_tokens_are_sharded_where_that_can_be_or_is_asked_for(tensor, sequence, seq_len, sharded):
    assert ParallelConfig(tensor=tensor, sequence=sequence).shards_tokens(seq_len) == sharded


def test_a_saved_configuration_shards_tokens_in_its_next_layout_too():
    saved = yaml.safe_load(dump_config(make_config(tree(model__d_model=96))))
    saved["parallel"]["tensor"] = 2
    config = make_config(saved)
    assert config.parallel.shards_tokens(config.data.seq_len)


def test_a_schedule_is_read_from_yaml_and_the_command_line_and_comes_back_from_a_dump(tmp_path, path):
    schedule = "{start: 0.5, end: 0.15, after: 0.3, until: 70, shape: cosine}"
    config = load_config(path, [f"model.gate.capacity={schedule}", "model.gate.tau=5e-1"])
    capacity = config.model.gate.capacity
    assert capacity == Schedule(start=0.5, end=0.15, after=0.3, until=70, shape="cosine")
    assert config.model.gate.tau == 0.5 and config.model.gate.final_capacity == 0.15
    (tmp_path / "again.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "again.yaml")
    assert again == config and isinstance(again.model.gate.capacity.until, int)
    assert load_config(tmp_path / "again.yaml", ["model.gate.capacity=0.2"]).model.gate.capacity == 0.2
    nested = load_config(tmp_path / "again.yaml", ["model.gate.capacity.end=0.1"])
    assert nested.model.gate.capacity.end == 0.1


def test_a_file_that_extends_another_says_only_what_differs(tmp_path, path):
    """Against a merge that is written out; extended files stand beside the extending one, wherever it is read from."""
    (tmp_path / "more").mkdir()
    middle, last = tmp_path / "more" / "middle.yaml", tmp_path / "last.yaml"
    middle.write_text("extends: ../c.yaml\nmodel: {d_ff: 96, mamba: {headdim: 16}}\noptim: {betas: [0.8, 0.9]}\n")
    last.write_text("extends: more/middle.yaml\nmodel: {mamba: {d_state: 32}}\noptim: {betas: [0.5, 0.6]}\n")
    whole = yaml.safe_load(path.read_text())
    whole["model"] |= {"d_ff": 96, "mamba": whole["model"].get("mamba", {}) | {"headdim": 16, "d_state": 32}}
    whole["optim"] = whole.get("optim", {}) | {"betas": [0.5, 0.6]}
    config = load_config(last, ["model.d_ff=64"])
    whole["model"]["d_ff"] = 64
    assert config == make_config(whole)
    assert "extends" not in dump_config(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: no.yaml", r"cannot read the configuration .*no\.yaml \(extended by .*b\.yaml\)"),
        ("extends: b.yaml", r"b\.yaml extends itself: .*b\.yaml -> .*b\.yaml"),
        ("extends: [c.yaml]", r"extends=\['c\.yaml'\] must be the path of one file"),
        ("extends: c.yaml\nmodel: {extends: c.yaml}", "unknown key 'model.extends'"),
        ("extends: c.yaml\nmodel: 3", "model"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path, path, text, words):
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "b.yaml")
