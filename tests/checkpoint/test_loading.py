"""What a run begins with: the state of another layout, bit for bit, and training goes on the same; weights alone."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from checkpoints import reshard
from megatron_taipan.checkpoint.calibration import read_capacity, read_thresholds, write_thresholds
from megatron_taipan.checkpoint.folder import find_newest
from megatron_taipan.checkpoint.loading import load_weights
from megatron_taipan.checkpoint.metadata import read_metadata
from megatron_taipan.checkpoint.reader import INDEX, StateReader
from megatron_taipan.checkpoint.verification import damage
from megatron_taipan.config_loading import load_config, make_config
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.engine.state_shards import KINDS
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.perplexity import score
from megatron_taipan.model.taipan import Taipan
from tests.checkpoints.made import memory_state, write_checkpoint, write_weights
from tests.distributed.launch import launch, run_program
from tests.distributed.series import Job, launch_series
from tests.train.runs import log, runs
from tests.train.toy import toy_config, toy_tree, write_data

# processes, and the section `parallel`
LAYOUTS = {
    "alone": (1, {"zero_stage": 1}),
    "alone, stage 0": (1, {"zero_stage": 0}),
    "2 data, stage 1": (2, {"zero_stage": 1}),
    "2 data, stage 3": (2, {"zero_stage": 3}),
    "2 tensor, stage 1": (2, {"zero_stage": 1, "tensor": 2, "sequence": False}),
    "2 tensor, stage 3": (2, {"zero_stage": 3, "tensor": 2}),
    "2 stages": (2, {"zero_stage": 1, "pipeline": 2}),
    "2 stages x 2 data": (4, {"zero_stage": 1, "pipeline": 2}),
    "2 tensor x 2 data, stage 2": (4, {"zero_stage": 2, "tensor": 2}),
    "4 tensor, sequence": (4, {"zero_stage": 1, "tensor": 4, "sequence": True}),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def tree_of(prefix: str, directory: Path, layout: str, **train) -> dict:
    """A run in one of the layouts; heads and groups are such that B, C, k and v are shared by several ranks."""
    processes, parallel = LAYOUTS[layout]
    train = {
        "steps": 40,
        "global_batch": 8,
        "micro_batch": 2,
        "precision": "fp32",
        "eval_every": 0,
        "eval_samples": 2,
    } | train
    tree = toy_tree(prefix, directory, parallel=parallel | {"timeout_s": 60}, train=train)
    tree["model"]["attention"] = {"n_heads": 4, "n_kv_heads": 1, "window": 12}
    tree["model"]["vocab_size"] = 67  # no tensor size divides it: the last shard is padded
    tree["optim"]["lr"] = 1e-3
    return tree


def convert(tree: dict, source: str) -> None:
    """Loads a checkpoint in this process group's layout and saves it again, untrained."""
    from megatron_taipan.checkpoint.loading import load_training_state
    from megatron_taipan.checkpoint.saving import Saving
    from megatron_taipan.checkpoint.snapshot import HostMemory, take_snapshot
    from megatron_taipan.engine.build import build_engine
    from megatron_taipan.ops.dispatch import pick_ops
    from megatron_taipan.parallel.connect import connect
    from megatron_taipan.train.start import build_training_model

    config = make_config(tree)
    groups, _ = connect(config.parallel, torch.device("cpu"), config.data.seq_len)
    config.train.seed += 1  # other initial weights: what is not loaded shows
    engine = build_engine(build_training_model(config, groups, pick_ops()), config, groups, torch.device("cpu"))
    config.train.seed -= 1
    identity = read_metadata(Path(source))["identity"]
    loaded = load_training_state(engine, Path(source), config=config, identity=identity, groups=groups)
    snapshot = take_snapshot(engine, config, groups, HostMemory())
    metadata = {"identity": identity}
    Saving(snapshot, Path(config.checkpoint.dir), loaded.progress, config=config, metadata=metadata).finish()


def everything(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    reader = StateReader(path, load_config(path / "config.yaml").model)
    tensors = {(name, kind): reader.full(name, kind).clone() for name in reader.table for kind in KINDS}
    return tensors | {(name, "buffer"): reader.buffer(name) for name in reader.buffers}


def test_there_and_back_is_bit_equal(tmp_path, prefix):
    """A -> B -> A for every other layout B, moments included; nothing is trained on the way."""
    home, others = "2 data, stage 1", [name for name in LAYOUTS if name != "2 data, stage 1"]
    folders = {name: (tmp_path / f"there {name}", tmp_path / f"back {name}") for name in others}
    source = tmp_path / "start" / "step_00000002"
    jobs = [Job(2, runs, [tree_of(prefix, tmp_path / "start", home, steps=2)])]
    for name, (there, back) in folders.items():
        jobs.append(Job(LAYOUTS[name][0], convert, tree_of(prefix, there, name), str(source)))
        jobs.append(Job(2, convert, tree_of(prefix, back, home), str(there / "step_00000002")))
    launch_series(jobs)
    before = everything(source)
    assert max(tensor.abs().max() for (_, kind), tensor in before.items() if kind == "exp_avg") > 0
    for path in (folder / "step_00000002" for pair in folders.values() for folder in pair):
        assert_holds(path, before)


def test_resharding_ahead_is_bit_equal_and_fits_the_processes(tmp_path, prefix, capsys):
    """A -> B -> A by the program, in one process; and a run in layout B continues from it with the same loss."""
    home, away = LAYOUTS["2 data, stage 1"], LAYOUTS["4 tensor, sequence"]
    start = tree_of(prefix, tmp_path / "start", "2 data, stage 1", steps=2)
    launch_series([Job(2, runs, [start])])
    source = tmp_path / "start" / "step_00000002"
    before = everything(source)
    capsys.readouterr()
    for name, (processes, parallel) in LAYOUTS.items():
        there = ["--processes", str(processes), "--zero-stage", str(parallel["zero_stage"])]
        there += ["--tensor", str(parallel.get("tensor", 1)), "--pipeline", str(parallel.get("pipeline", 1))]
        assert reshard.main([str(tmp_path / "start"), str(tmp_path / name), *there]) == 0
        back = ["--processes", "2", "--zero-stage", "1", "--tensor", "1", "--pipeline", "1"]
        assert reshard.main([str(tmp_path / name), str(tmp_path / f"back {name}"), *back]) == 0
        for folder in (name, f"back {name}"):
            path = tmp_path / folder / "step_00000002"
            assert_holds(path, before)
            assert damage(path) is None
        path = tmp_path / name / "step_00000002"
        assert len(list((path / "state").glob("*.safetensors"))) == processes
        assert read_metadata(path)["layout"]["processes"] == processes
    # what a rank needs lies in its own file
    index = json.loads((tmp_path / "4 tensor, sequence" / "step_00000002" / INDEX).read_text())
    assert [run[:2] for run in index["parameters"]["layers.0.mixer.in_proj_z"]] == [
        [f"rank_{rank:05d}.safetensors", rank] for rank in range(4)
    ]
    index = json.loads((tmp_path / "2 stages" / "step_00000002" / INDEX).read_text())
    assert index["parameters"]["embedding.weight"][0][0] == "rank_00000.safetensors"
    assert index["parameters"]["final_norm.weight"][0][0] == "rank_00001.safetensors"
    moved = tree_of(prefix, tmp_path / "4 tensor, sequence", "4 tensor, sequence", steps=4)
    still = tree_of(prefix, tmp_path / "start", "2 data, stage 1", steps=4)
    launch_series([Job(away[0], runs, [moved]), Job(home[0], runs, [still])])
    ours, theirs = log(tmp_path / "4 tensor, sequence"), log(tmp_path / "start")[2:]
    assert [record["step"] for record in ours] == [3, 4]
    assert [record["ce"] for record in ours] == pytest.approx([record["ce"] for record in theirs], rel=1e-5)


def test_a_layout_that_does_not_fit_or_a_damaged_source_is_refused(tmp_path, prefix, capsys):
    launch_series([Job(1, runs, [tree_of(prefix, tmp_path / "run", "alone", steps=1)])])
    run, path = str(tmp_path / "run"), tmp_path / "run" / "step_00000001"
    for options, words in (
        (["--tensor", "3", "--processes", "3"], "parallel.tensor=3 does not divide"),
        (["--tensor", "2", "--processes", "3"], "3 processes cannot hold"),
        (["--tensor", "2"], "give --processes, a multiple of 2"),
        (["--pipeline", "2", "--processes", "2", "--zero-stage", "3"], "pipeline"),
        (["--pipeline", "9", "--processes", "9"], "needs at least 9 layers"),
    ):
        assert reshard.main([run, str(tmp_path / "out"), *options]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    file = path / "state" / "rank_00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert reshard.main([run, str(tmp_path / "out")]) == 2
    assert "changed since it was written" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("stages", [1, 3])
def test_a_pattern_with_cuts_is_resharded_to_other_stages(tmp_path, stages):
    state = memory_state("M S | W M")
    tree = state.config.model_dump(mode="json")
    source = write_checkpoint(tmp_path / "run", make_config(tree | {"parallel": {"pipeline": 2}}), state.load)
    thresholds = {"layers.1.gate.threshold": 0.25}
    write_thresholds(source, thresholds, capacity=0.3)
    options = ["--pipeline", str(stages), "--processes", str(stages)]
    assert reshard.main([str(source), str(tmp_path / "out"), *options]) == 0
    path = tmp_path / "out" / source.name
    after = StateReader(path, load_config(path / "config.yaml").model)
    assert after.model.letters == "MSWM" and not after.model.cuts
    assert (read_thresholds(path), read_capacity(path)) == (thresholds, 0.3)
    assert all(torch.equal(after.full(name, "master"), state.load(name)) for name in after.table)


def assert_holds(path: Path, before: dict[tuple[str, str], torch.Tensor]) -> None:
    """The checkpoint holds exactly these tensors, each element once."""
    after = everything(path)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), (path.parent.name, key)
    index = json.loads((path / INDEX).read_text())
    assert index["optimizer_step"] == 2
    total = sum(count for shards in index["parameters"].values() for *_, count in shards)
    table = StateReader(path, load_config(path / "config.yaml").model).table
    shards = {name: index["tensor"] if spec.split is not None else 1 for name, spec in table.items()}
    sizes = {name: torch.Size(spec.local_shape(index["tensor"])).numel() for name, spec in table.items()}
    assert total == sum(sizes[name] * shards[name] for name in table)


def test_a_run_that_changes_its_layout_at_every_stop_learns_the_same(tmp_path, prefix):
    chain = list(LAYOUTS)
    moving = [tree_of(prefix, tmp_path / "moving", name, stop_at=2 * n) for n, name in enumerate(chain, start=1)]
    jobs = [Job(LAYOUTS[name][0], runs, [tree]) for name, tree in zip(chain, moving, strict=True)]
    jobs.append(Job(1, runs, [tree_of(prefix, tmp_path / "still", "alone", stop_at=2 * len(chain))]))
    assert all(results[0] == [0] for results in launch_series(jobs))
    still, moved = (log(tmp_path / name) for name in ("still", "moving"))
    assert [record["step"] for record in moved] == list(range(1, 2 * len(chain) + 1))
    for ours, theirs in zip(moved, still, strict=True):
        assert ours["ce"] == pytest.approx(theirs["ce"], rel=1e-5), ours["step"]
        assert ours["lr"] == theirs["lr"]


def test_missing_elements_are_an_error(tmp_path, prefix):
    assert launch(2, runs, [tree_of(prefix, tmp_path, "2 data, stage 1", steps=1)])[0] == [0]
    path = find_newest(tmp_path).path
    index = json.loads((path / INDEX).read_text())
    name = max(index["parameters"], key=lambda n: len(index["parameters"][n]))
    index["parameters"][name].pop()
    (path / INDEX).write_text(json.dumps(index))
    reader = StateReader(path, load_config(path / "config.yaml").model)
    with pytest.raises(UserError, match=f"{name} .* of .* elements"):
        reader.full(name, "master")


def test_a_run_starts_from_the_weights_in_another_layout_and_resumes_from_its_own_checkpoint(tmp_path):
    tree = toy_tree(
        write_data(tmp_path / "data"),
        tmp_path / "run",
        parallel={"tensor": 2, "zero_stage": 3},
        train={"steps": 2, "eval_samples": 12},
        checkpoint={"init": str(tmp_path / "weights")},
    )
    config = make_config(tree)
    model = Taipan(config.model, seed=77)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    write_weights(tmp_path / "weights", model)
    wanted = score(model, build_dataset(config.data, "valid", config.model.vocab_size), samples=12)

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    command = ["launch/pretrain.py", "--config", str(tmp_path / "config.yaml")]
    run_program(2, [*command, "train.stop_at=1"]).succeeded()
    run_program(2, command).succeeded()
    valid = [record["ce"] for record in log(tmp_path / "run", "valid")]
    assert valid[0] == pytest.approx(wanted.ce, rel=2e-6)
    assert [record["step"] for record in log(tmp_path / "run")] == [1, 2]
    assert valid[-1] < valid[0]  # the second start went on; from the weights again it would score as before step 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "M S M W"}, "has the layers MSMA, model.pattern gives MSMW"),
        ({"d_ff": 64}, r"\[48, 32\].*\[64, 32\]"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, changes, words):
    theirs = toy_config("none").model
    write_weights(tmp_path / "weights", Taipan(theirs))
    ours = theirs.model_copy(update=changes)
    with pytest.raises(UserError, match=words):
        load_weights(Taipan(ours), tmp_path / "weights")


def test_weights_for_a_network_that_computes_otherwise_are_taken_and_that_is_told(tmp_path):
    theirs = toy_config("none").model
    write_weights(tmp_path / "weights", Taipan(theirs))
    assert load_weights(Taipan(theirs), tmp_path / "weights") == []
    gate = theirs.gate.model_copy(update={"refinement": "add", "init_bias": 2.0, "capacity": 0.3})
    ours = theirs.model_copy(update={"gate": gate, "norm_eps": 1e-6, "pattern": "M S | M A"})
    assert load_weights(Taipan(ours), tmp_path / "weights") == [
        "model.norm_eps: 1e-05, this run 1e-06",
        "model.gate.refinement: replace, this run add",
    ]


def test_a_network_of_another_tokenizer_is_refused(tmp_path):
    for name in ("first", "second"):
        said = {"shards": [{"prefix": name}], "tokenizer": {"name": name, "sha256": name}}
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
    config = make_config(toy_tree(str(tmp_path / "first"), tmp_path / "run"))
    model = Taipan(config.model, seed=1)
    path = write_checkpoint(tmp_path / "run", config, model.state_dict().__getitem__)
    assert load_weights(model, path, prefixes=[str(tmp_path / "first"), str(tmp_path / "unknown")]) == []
    with pytest.raises(UserError, match="second was made with the tokenizer second .* and .*first with first"):
        load_weights(model, path, prefixes=[str(tmp_path / "second")])
