"""Files from strangers: no program that reads them runs what they hold; each says in one line what is wrong."""

import ast
import json
from pathlib import Path

import pytest
import torch
import yaml

from checkpoints import diff, export_hf, import_hf, import_mamba2, inspector, reshard, verify
from megatron_taipan.checkpoint import folder
from megatron_taipan.evaluation import calibrate, perplexity
from megatron_taipan.inference import generate
from tests.checkpoint.folders import rehash
from tests.checkpoints.made import memory_state, write_checkpoint
from tests.distributed.series import Job, launch_series
from tests.train.runs import runs
from tests.train.toy import toy_tree, write_data

ROOT = Path(__file__).resolve().parents[2]
EXECUTED = "EXECUTED"  # a file that appears where code was run


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return (open, (str(self.place / EXECUTED), "w"))


@pytest.fixture
def weights(tmp_path) -> Path:
    """A folder like an export, whose tensors are a pickle and whose code would run."""
    place = tmp_path / "weights"
    place.mkdir()
    code = f"open({str(tmp_path / EXECUTED)!r}, 'w')\nTaipanConfig = TaipanForCausalLM = None\n"
    for name in ("modeling_taipan.py", "configuration_taipan.py", "sitecustomize.py", "conftest.py"):
        (place / name).write_text(code)
    network = memory_state().config.model.model_dump(mode="json")
    auto_map = {"AutoConfig": "configuration_taipan.TaipanConfig", "AutoModelForCausalLM": "modeling_taipan.X"}
    (place / "config.json").write_text(json.dumps({"network": network, "auto_map": auto_map}))
    torch.save({"model.embedding.weight": Evil(tmp_path)}, place / "model.safetensors")
    torch.save({"backbone.layers.0.norm.weight": Evil(tmp_path)}, place / "pytorch_model.bin")
    torch.save(Evil(tmp_path), place / "tokenizer.json")
    return place


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint with an honest manifest, whose state is a pickle."""
    state = memory_state()
    path = write_checkpoint(tmp_path / "run", state.config, state.load)
    file = path / "state" / "rank_00000.safetensors"
    torch.save({"embedding.weight|master": Evil(tmp_path)}, file)
    rehash(path)
    return path


def programs(place: Path, out: Path) -> list[tuple]:
    """Every program that opens weights, with arguments that make it read them."""
    config = out.parent / "config.yaml"
    tree = memory_state().config.model_dump(mode="json")
    config.write_text(yaml.safe_dump(tree))
    return [
        (inspector, [place]),
        (inspector, [place, "--tensors"]),
        (diff, [place, place]),
        (export_hf, [place, out, "--no-tokenizer"]),
        (import_hf, [place, out]),
        (import_mamba2, [place, out, "--config", config]),
        (reshard, [place, out, "--processes", "2"]),
        (generate, [place, "--prompt", "a", "--device", "cpu"]),
        (perplexity, [place, "--device", "cpu"]),
        (calibrate, [place, "--device", "cpu"]),
    ]


@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_no_program_runs_a_pickle(request, kind, tmp_path, capsys):
    place = request.getfixturevalue(kind)
    for program, arguments in programs(place, tmp_path / "out"):
        status = program.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert not (tmp_path / EXECUTED).exists(), program.__name__
        reads_no_tensors = program is inspector and kind == "checkpoint"
        assert reads_no_tensors or (status == 2 and error.count("error: ") == 1), (program.__name__, status, error)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir()), program.__name__


def test_a_configuration_cannot_construct_objects(checkpoint, tmp_path, capsys):
    text = f"!!python/object/apply:os.mknod [{str(tmp_path / EXECUTED)!r}]\n"
    (checkpoint / folder.CONFIG).write_text(text)
    rehash(checkpoint)
    for program, arguments in programs(checkpoint, tmp_path / "out"):
        assert program.main([str(argument) for argument in arguments]) == 2, program.__name__
        assert not (tmp_path / EXECUTED).exists(), program.__name__
    assert verify.main([str(checkpoint)]) == 0  # reads bytes only
    assert not (tmp_path / EXECUTED).exists()


def test_a_training_run_runs_no_pickle(weights, checkpoint, tmp_path):
    """Neither as the weights to begin with nor as the state to go on from."""
    prefix = write_data(tmp_path / "data")
    trees = []
    for option, place in (("init", weights), ("init", checkpoint), ("load", checkpoint)):
        tree = toy_tree(prefix, tmp_path / f"{option} {place.name}", checkpoint={option: str(place)})
        trees.append(tree | {"model": memory_state(vocab_size=64).config.model.model_dump(mode="json")})
    for message in launch_series([Job(1, runs, trees)])[0][0]:
        assert isinstance(message, str), message
    assert not (tmp_path / EXECUTED).exists()


def test_nothing_in_the_source_could_run_a_pickle():
    """No pickle module, torch.load only with weights_only=True, YAML only by the one reader of it."""
    for room in ("megatron_taipan", "checkpoints", "launch", "data_prep"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & set(names), path
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                call, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert call != "torch.load" or given.get("weights_only") == "True", f"{path}:{node.lineno}"
                assert not (call.startswith("yaml.") and "load" in call), f"{path}:{node.lineno}: use parse_yaml"
                assert call not in ("np.load", "numpy.load") or given.get("allow_pickle") in (None, "False"), path
