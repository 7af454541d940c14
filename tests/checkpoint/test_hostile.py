"""Checkpoints whose files say what they must not: one line of ours, and no file outside the folder is touched."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import diff, export_hf, inspector, reshard, verify
from megatron_taipan.checkpoint import folder
from megatron_taipan.checkpoint.metadata import read_metadata
from megatron_taipan.checkpoint.randomness import random_states, set_random_states
from megatron_taipan.checkpoint.reader import INDEX, StateReader
from megatron_taipan.config_loading import load_config
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation import perplexity
from tests.checkpoint.folders import rehash
from tests.checkpoints.made import memory_state, write_checkpoint
from tests.distributed.launch import launch
from tests.train.runs import runs
from tests.train.toy import toy_tree, write_data

OUTSIDE = ["../outside", "/etc/passwd", "..", ".", "", "state/../../outside", "a\\b", "a\0b", "a/b"]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    state = memory_state()
    return write_checkpoint(tmp_path / "run", state.config, state.load)


def rewrite(path: Path, name: str, change) -> None:
    """Changes a JSON file of a checkpoint, and makes the manifest agree."""
    content = json.loads((path / name).read_text())
    changed = change(content)
    (path / name).write_text(json.dumps(content if changed is None else changed))
    rehash(path)


def put(*place: str | int, value: Any):
    """Sets a value deep inside."""

    def change(content: Any) -> None:
        for step in place[:-1]:
            content = content[step]
        content[place[-1]] = value

    return change


def reader(path: Path) -> StateReader:
    return StateReader(path, load_config(path / folder.CONFIG).model)


def programs(path: Path, out: Path) -> list[tuple]:
    return [
        (inspector, [path]), (inspector, [path, "--tensors"]), (diff, [path, path]), (verify, [path]),
        (export_hf, [path, out, "--no-tokenizer"]), (reshard, [path, out, "--processes", "2"]),
        (perplexity, [path, "--device", "cpu"]),
    ]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_other_places(checkpoint, tmp_path, name, capsys):
    (tmp_path / "run" / "outside").write_text("a secret")
    manifest = json.loads((checkpoint / folder.MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 8, "sha256": "0" * 64}
    (checkpoint / folder.MANIFEST).write_text(json.dumps(manifest))
    assert "which is not a file of a checkpoint" in (folder.incomplete(checkpoint) or "")
    for program, arguments in programs(checkpoint, tmp_path / "out"):
        status, said = program.main([str(argument) for argument in arguments]), capsys.readouterr()
        assert status in (1, 2) and "not a file of a checkpoint" in said.err + said.out, program.__name__


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_names_other_places(checkpoint, name):
    rewrite(checkpoint, INDEX, put("parameters", "embedding.weight", 0, 0, value=name))
    with pytest.raises(UserError, match="is not the name of a file beside it") as error:
        reader(checkpoint)
    assert "\n" not in str(error.value)


def test_a_buffer_in_another_place(checkpoint):
    rewrite(checkpoint, INDEX, put("buffers", "layers.1.gate.threshold", value="../../x.safetensors"))
    with pytest.raises(UserError, match="not the name of a file beside it"):
        reader(checkpoint)


@pytest.mark.parametrize(
    "change, words",
    [
        (put("tensor", value="x"), "tensor: input should be a valid integer"),
        (put("tensor", value=0), "tensor: input should be greater than or equal to 1"),
        (put("tensor", value=7), "7"),
        (put("processes", value=-1), "processes"),
        (put("optimizer_step", value=1.5), "optimizer_step"),
        (put("scaler", value={"cur_scale": "big"}), "scaler"),
        (put("scaler", value={"cur_scale": 1.0}), "lacks cur_hysteresis"),
        (put("parameters", value=[]), "parameters"),
        (put("parameters", "embedding.weight", 0, value=["rank_00000.safetensors", 0, 0]), "parameters.embedding"),
        (put("parameters", "embedding.weight", 0, 3, value=-5), "parameters.embedding"),
        (put("parameters", "embedding.weight", 0, 3, value=None), "parameters.embedding"),
        (lambda _: [], "damaged"),
        (lambda _: None if False else "text", "damaged"),
    ],
)
def test_fields_of_the_index(checkpoint, change, words):
    rewrite(checkpoint, INDEX, change)
    with pytest.raises(UserError) as error:
        reader(checkpoint).full("embedding.weight", "master")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        put("progress", value=None), put("progress", "step", value="7"), put("progress", "step", value=-7),
        put("progress", "step", value=True), put("progress", "tokens", value=1e300),
        put("progress", "samples", value=None), put("progress", "recent", value=["a"]),
        put("progress", "shares", value=0.5), put("progress", "rewinds", value={"a": 1}),
        put("progress", "unknown", value=1), put("identity", value=[]), put("layout", value="2 x 2"),
        put("versions", value=3), lambda _: [1],
    ],
)  # fmt: skip
def test_fields_of_the_metadata(checkpoint, tmp_path, change, capsys):
    rewrite(checkpoint, folder.METADATA, change)
    with pytest.raises(UserError) as error:
        read_metadata(checkpoint)
    assert "\n" not in str(error.value)
    for program, arguments in programs(checkpoint, tmp_path / "out"):
        if program is not verify:  # reads bytes only
            status, said = program.main([str(argument) for argument in arguments]), capsys.readouterr().err
            assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, (program.__name__, said)


@pytest.mark.parametrize("name", [folder.MANIFEST, folder.METADATA, INDEX])
def test_json_nested_too_deeply(checkpoint, tmp_path, name, capsys):
    (checkpoint / name).write_text('{"format": 1, "files": ' + "[" * 100_000)
    if name != folder.MANIFEST:
        rehash(checkpoint)
    for program, arguments in programs(checkpoint, tmp_path / "out"):
        status, said = program.main([str(argument) for argument in arguments]), capsys.readouterr()
        looks_elsewhere = program is verify or (program is inspector and name == INDEX)
        assert status in (1, 2) or looks_elsewhere, program.__name__
        assert "Traceback" not in said.err


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3), torch.zeros(2, 2), torch.zeros(()), torch.zeros(64 * 32, dtype=torch.bfloat16)],
)
def test_tensors_of_another_shape_or_type(checkpoint, tensor):
    file = checkpoint / "state" / "rank_00000.safetensors"
    save_file(load_file(file) | {"embedding.weight|master": tensor}, file)
    with pytest.raises(UserError, match="rank_00000.safetensors is damaged: embedding.weight.master"):
        reader(checkpoint).full("embedding.weight", "master")


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
@pytest.mark.parametrize(
    "state",
    [b"", b"{", b"[]", b"[1, 2, 3]", b'[3, ["x"], null]', b'["MT19937", [1], 1, 0, 0.0]', b"[" * 50_000,
     b'["MT19937", [99999999999999], 1, 0, 0.0]', b"null", b"\xff\xfe"],
)  # fmt: skip
def test_random_states_that_are_none(name, state):
    before = random_states()
    tensor = torch.frombuffer(bytearray(state), dtype=torch.uint8) if state else torch.zeros(0, dtype=torch.uint8)
    with pytest.raises(UserError, match=f"the random numbers of {name} is damaged") as error:
        set_random_states({name: tensor})
    assert "\n" not in str(error.value)
    set_random_states(before)


def test_a_run_says_in_one_line_what_is_wrong_with_what_it_resumes_from(tmp_path):
    """Each resume meets another damage of the same checkpoint, whose manifest is right; the last one none."""
    tree = toy_tree(write_data(tmp_path / "data"), tmp_path / "run", train={"steps": 2, "stop_at": 1})
    assert launch(1, runs, [tree]) == [[0]]
    (path,) = folder.checkpoints(tmp_path / "run")
    file = path / "state" / "rank_00000.safetensors"
    good = {name: (path / name).read_bytes() for name in folder.read_manifest(path)}
    found = []

    def damaged(name: str, content: bytes) -> None:
        (path / name).write_bytes(content)
        rehash(path)
        found.extend(launch(1, runs, [tree | {"train": tree["train"] | {"stop_at": 2}}])[0])
        (path / name).write_bytes(good[name])
        rehash(path)

    metadata = json.loads(good[folder.METADATA])
    damaged(folder.METADATA, json.dumps(metadata | {"progress": metadata["progress"] | {"samples": "8"}}).encode())
    save_file(load_file(file) | {"numpy|random": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "changed")
    damaged("state/rank_00000.safetensors", (tmp_path / "changed").read_bytes())
    save_file(load_file(file) | {"layers.1.gate.threshold|buffer": torch.zeros(1)}, tmp_path / "changed")
    damaged("state/rank_00000.safetensors", (tmp_path / "changed").read_bytes())
    index = json.loads(good[INDEX])
    index["parameters"]["embedding.weight"][0][0] = "../../../x.safetensors"
    damaged(INDEX, json.dumps(index).encode())
    words = ["progress.samples", "random numbers of numpy", "has shape [1], not []", "not the name of a file beside it"]
    for message, word in zip(found, words, strict=True):
        assert isinstance(message, str) and word in message and "\n" not in message, message
    assert launch(1, runs, [tree | {"train": tree["train"] | {"stop_at": 2}}]) == [[0]]
