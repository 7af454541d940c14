"""Reading a configuration: files, overrides, and errors that name the key."""

import re

import pytest
import yaml

from megatron_taipan.config_errors import ConfigError
from megatron_taipan.config_loading import load_config, make_config, refuse_unexpanded
from megatron_taipan.config_text import dump_config
from megatron_taipan.errors import UserError
from megatron_taipan.gate_config import Schedule
from tests.config_tree import TREE, tree


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
            "train.eval_every=1e3",
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
    assert (config.train.steps, config.train.eval_every) == (25, 1000)
    assert (config.optim.lr, config.optim.min_lr) == (3e-4, 1e-6)
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


@pytest.mark.parametrize("name", ["12345", "007", "2e3", "1e-4", "nan", "2026-11-30", "true", "1_000", "0x10"])
def test_a_folder_may_be_named_as_a_number(path, name):
    """After a job, a day, a learning rate: as it was written, although YAML reads something else."""
    config = load_config(path, [f"checkpoint.dir={name}", f"checkpoint.load={name}", "optim.lr=2e-3"])
    assert (config.checkpoint.dir, config.checkpoint.load, config.optim.lr) == (name, name, 2e-3)
    assert load_config(path, ["checkpoint.load=null"]).checkpoint.load is None


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
