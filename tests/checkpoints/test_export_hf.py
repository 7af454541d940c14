"""An exported folder stands by itself, and a folder that disagrees with the trainer is never written."""

import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from checkpoints import export_files, export_hf, streamed, whole_folder
from checkpoints.export_hf import export, find_tokenizer, main
from checkpoints.map_weights import Source, map_weights
from megatron_taipan.checkpoint.files import TensorFile
from megatron_taipan.config_text import dump_config
from megatron_taipan.data_config import DataSource
from megatron_taipan.errors import UserError
from megatron_taipan.inference.generation import generate
from megatron_taipan.inference.loading import build_with_weights, load_model
from megatron_taipan.inference.text import model_tokenizer
from tests.checkpoints.made import MANIFEST, MemoryState, memory_state, train_sentencepiece, write_checkpoint
from tests.inference.networks import VOCABULARY

STRANGER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron_taipan":
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
tokens = torch.arange(1, 41).view(2, 20)
with torch.no_grad():
    logits = model(tokens).logits
greedy = model.generate(tokens, max_new_tokens=8, do_sample=False)
torch.save({"logits": logits, "greedy": greedy, "dtype": str(model.dtype)}, out)
"""


def as_a_stranger(folder, scratch) -> dict:
    """Loads the folder in a process that starts elsewhere and cannot import our package."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    (scratch / "stranger.py").write_text(STRANGER)
    command = [sys.executable, "-I", str(scratch / "stranger.py"), str(folder), str(scratch / "out.pt")]
    subprocess.run(command, cwd=scratch, env=env, check=True, capture_output=True)
    return torch.load(scratch / "out.pt", weights_only=True)


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, True), (torch.bfloat16, False)])
def test_the_folder_gives_the_trainers_logits_elsewhere(tmp_path, dtype, tied):
    state = memory_state("M S W M A", tie_embeddings=tied)
    assert export(state, tmp_path / "hf", dtype=dtype, max_shard_bytes=20_000) <= 1e-5
    answer = as_a_stranger(tmp_path / "hf", tmp_path)
    model = build_with_weights(state.config.model, state.load, dtype)
    tokens = torch.arange(1, 41).view(2, 20)
    with torch.no_grad():
        logits = model(tokens).logits
    assert answer["dtype"] == str(dtype)
    assert (answer["logits"] - logits).abs().max() <= 1e-5 * logits.abs().max()
    ours = generate(model, tokens.tolist(), max_new_tokens=8)
    assert answer["greedy"][:, 20:].tolist() == ours

    again, _, _ = load_model(tmp_path / "hf", dtype)  # our own reader, which runs none of the folder's code
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, logits)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()


def test_a_folder_whose_gate_has_schedules_stands_by_itself(tmp_path):
    """transformers runs the files for the configuration and again for the model, each with classes of its own."""
    gate = {
        "capacity": {"start": 0.9, "end": 0.3}, "tau": {"start": 2.0, "end": 0.5}, "noise": "random",
        "budget_lambda": {"start": 0.0, "end": 5.0}, "refinement": "add", "weight": "one",
        "gradient": "sampled", "gradient_share": {"start": 1.0, "end": 0.1},
    }  # fmt: skip
    state = memory_state("M S", gate=gate)
    assert export(state, tmp_path / "hf") <= 1e-5
    tokens = torch.arange(1, 41).view(2, 20)
    with torch.no_grad():
        logits = build_with_weights(state.config.model, state.load, torch.float32)(tokens).logits
    assert (as_a_stranger(tmp_path / "hf", tmp_path)["logits"] - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_islands_stay_float32_in_a_bf16_file(tmp_path):
    export(memory_state(), tmp_path / "hf", dtype=torch.bfloat16)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}
        threshold = file.get_tensor("model.layers.1.gate.threshold")
    wide = {name.rpartition(".")[2] for name, dtype in kinds.items() if dtype == torch.float32}
    assert wide == {"A_log", "dt_bias", "D", "weight", "bias", "threshold"}
    assert {n for n in kinds if n.endswith(".weight") and kinds[n] == torch.float32} == {"model.layers.1.gate.weight"}
    assert threshold == 0.125


def test_tokenizer_settings_and_card_are_there(tmp_path):
    state = memory_state(vocab_size=600)
    tokenizer = train_sentencepiece(tmp_path)
    export(state, tmp_path / "hf", tokenizer=tokenizer)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    settings = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert settings == {"eos_token_id": 2, "pad_token_id": 2}  # what stood before the documents is not known
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_taipan.TaipanForCausalLM"
    card = (tmp_path / "hf/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "trust_remote_code=True" in card
    assert "7 steps, 500 tokens; samples of 32 tokens" in card
    example = card.split("```python\n")[1].split("```")[0]
    (tmp_path / "example.py").write_text(example)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", str(tmp_path / "example.py")]
    done = subprocess.run(
        command, cwd=tmp_path / "hf", env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0 and done.stdout.startswith("Once upon a time"), done.stderr


class Disagreeing(MemoryState):
    """Gives other weights the second time it is asked: what is written is not what the trainer computes with."""

    def load(self, name: str) -> torch.Tensor:
        tensor = self.weights[name]
        if name == "layers.0.mixer.out_proj":
            self.asked = getattr(self, "asked", 0) + 1
            return tensor * (1 + 1e-3 * self.asked)
        return tensor


@pytest.mark.parametrize("stream_above", [10**9, 0])
def test_a_folder_that_disagrees_is_not_written(tmp_path, stream_above):
    state = memory_state()
    with pytest.raises(UserError, match="logits differ from the trainer's"):
        export(Disagreeing(state.config, state.weights), tmp_path / "hf", stream_above=stream_above)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_large_model_is_checked_layer_by_layer(tmp_path, dtype, tied):
    """The same folder as of a check of the whole, and the same logits to the last bit."""
    state = memory_state("M S W M A", tie_embeddings=tied)
    for name, above in (("whole", 10**9), ("streamed", 0)):
        assert export(state, tmp_path / name, dtype=dtype, max_shard_bytes=20_000, stream_above=above) == 0.0
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes()
    tokens = torch.arange(1, 41).view(2, 20)
    whole = build_with_weights(state.config.model, state.load, dtype)(tokens).logits
    assert torch.equal(export_hf.trainer_logits(state.config.model, state, tokens, dtype, dtype), whole)
    rounded = {name: tensor.to(dtype) if is_lowered(name) else tensor for name, tensor in state.weights.items()}
    wide = build_with_weights(state.config.model, lambda name: rounded[name].float(), torch.float32)(tokens).logits
    ours = export_hf.trainer_logits(state.config.model, state, tokens, dtype, torch.float32)
    assert torch.equal(ours, wide)
    assert dtype == torch.float32 or 0 < (ours - whole).abs().max() < 0.05 * whole.abs().max()
    again = export_hf.trainer_logits(state.config.model, state, tokens, dtype, torch.float32, prefill=7)
    assert torch.allclose(again, wide, atol=1e-5 * float(wide.abs().max()))


def is_lowered(name: str) -> bool:
    """Whether a weight of memory_state's network is stored in bf16."""
    return name.rpartition(".")[2] not in ("A_log", "dt_bias", "D", "bias", "threshold") and "gate.weight" not in name


# A file of the exported folder, a line's part, and what stands there by mistake.
MISTAKES = {
    "a window of one less": ("taipan_context.py", "self.position - window + 1", "self.position - window + 2"),
    "a cache that keeps the first keys": ("taipan_context.py", "self.used - keep : self.used", ":keep"),
    "a convolution that forgets": ("taipan_mamba2.py", "xBC, state.conv_tail = xBC", "xBC, _ = xBC"),
    "a state passed on wrongly": ("taipan_ops.py", "carried = cum[:, :, -1]", "carried = cum[:, :, 0]"),
    "a gate without threshold": ("taipan_attention.py", "margin > self.threshold", "margin > 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_folders_code_is_found(tmp_path, monkeypatch, mistake):
    """Though a window and a chunk of the network are longer than what the check computes."""
    file, right, wrong = MISTAKES[mistake]
    sources = dict(export_hf.bundle_sources())
    assert sources[file].count(right) == 1
    sources[file] = sources[file].replace(right, wrong)
    monkeypatch.setattr(export_hf, "bundle_sources", lambda: sources)
    state = memory_state(attention={"n_heads": 2, "window": 999}, mamba={"d_state": 8, "headdim": 8, "chunk_size": 256})
    with pytest.raises(UserError, match="logits differ from the trainer's|logits that differ"):
        export(state, tmp_path / "hf", stream_above=0)
    assert list(tmp_path.iterdir()) == []


# How generate() is told something wrong though the forward pass is right, and what then fails.
MISTOLD = {
    "a cache under a name that forward does not get": (
        "modeling_taipan.py",
        "return parent.prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)",
        "return parent.prepare_inputs_for_generation(input_ids, *args, **kwargs) | {CACHE: None}",
        "with a cache",
    ),
    "a cache that seems empty": (
        "taipan_inputs.py",
        "return self.state.length if self.state is not None else 0",
        "return 0",
        "from a returned cache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTOLD)
def test_a_generate_that_loses_the_cache_is_found(tmp_path, monkeypatch, mistake):
    file, right, wrong, how = MISTOLD[mistake]
    sources = dict(export_hf.bundle_sources())
    assert sources[file].count(right) == 1
    sources[file] = sources[file].replace(right, wrong)
    monkeypatch.setattr(export_hf, "bundle_sources", lambda: sources)
    refused = r"attention_mask is \[2, 41\], but must be \[2, 1\]"  # by forward, where a release passes a mask of ones
    wrong_logits = f"of transformers {version('transformers')} {how} goes by logits that differ"
    with pytest.raises(UserError, match=f"{wrong_logits}|{refused}"):
        export(memory_state("M S"), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_of_another_network_is_found(tmp_path, monkeypatch):
    right = export_files.config_json

    def wrong(*arguments) -> dict:
        written = right(*arguments)
        written["network"]["attention"]["window"] += 1
        return written

    monkeypatch.setattr(export_files, "config_json", wrong)
    with pytest.raises(UserError, match="config.json describes another network"):
        export(memory_state(), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_streamed_model_holds_one_layer(monkeypatch, tied):
    """And the embedding besides where the head uses it too."""
    networks, most = [], 0
    fill = streamed.fill

    def counting_fill(module, prefix, load):
        nonlocal most
        fill(module, prefix, load)
        most = max(most, sum(p.numel() for p in networks[0].parameters() if not p.is_meta))

    monkeypatch.setattr(streamed, "fill", counting_fill)
    monkeypatch.setattr(export_hf, "stream", lambda net, load: (networks.append(net), streamed.stream(net, load)))
    state = memory_state("M S W M A", tie_embeddings=tied)
    export_hf.trainer_logits(state.config.model, state, torch.arange(1, 9)[None], *[torch.float32] * 2)
    (network,) = networks
    layer = max(sum(p.numel() for p in module.parameters()) for module in network.layers)
    table = network.embedding.weight.numel()
    assert most == (table + layer if tied else max(table, layer))


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    state = memory_state()
    state.weights["final_norm.weight"] = torch.full_like(state.weights["final_norm.weight"], torch.nan)
    with pytest.raises(UserError, match="differ"):
        export(state, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_load_is_not_written(tmp_path, monkeypatch):
    sources = export_hf.bundle_sources()
    del sources["taipan_ops.py"]
    monkeypatch.setattr(export_hf, "bundle_sources", lambda: sources)
    with pytest.raises(UserError, match="does not load by itself.*taipan_ops"):
        export(memory_state(), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["megatron_taipan", "data_prep", "model_card"])
def test_a_folder_that_needs_our_modules_is_not_written(tmp_path, monkeypatch, name):
    """Though they are installed, in PYTHONPATH or beside the file that the check runs."""
    monkeypatch.setenv("PYTHONPATH", str(Path(export_hf.__file__).parents[1]))
    sources = dict(export_hf.bundle_sources())
    sources["taipan_ops.py"] = f"import importlib\nimportlib.import_module({name!r})\n" + sources["taipan_ops.py"]
    monkeypatch.setattr(export_hf, "bundle_sources", lambda: sources)
    with pytest.raises(UserError, match=f"does not load by itself.*{name}"):
        export(memory_state(), tmp_path / "hf")


@pytest.mark.parametrize("relative", [False, True])
def test_packages_that_are_only_in_pythonpath_are_seen(tmp_path, monkeypatch, relative):
    """As clusters' modules have them: what the check imports there tells that it was looked for."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/pydantic.py").write_text("raise ImportError('found in PYTHONPATH')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "packages" if relative else str(tmp_path / "packages"))
    with pytest.raises(UserError, match="does not load by itself.*found in PYTHONPATH"):
        export(memory_state(), tmp_path / "hf")


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    """Not the export's, which may be on another disk."""

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_hf, "write_json", full)
    with pytest.raises(UserError, match=f"^{re.escape(tempfile.gettempdir())}.* was not written: No space left"):
        export(memory_state(), tmp_path / "hf")


def test_a_path_that_is_not_utf8_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"caf\\xe9/hf' is not UTF-8"):
        export(memory_state(), Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9/hf")))


def test_so_is_one_that_libraries_do_not_find_in_the_locale(tmp_path, monkeypatch):
    """In a Latin-1 locale, where they look for its name in UTF-8."""
    monkeypatch.setattr(os, "fsencode", lambda path: os.fspath(path).encode("latin-1"))
    with pytest.raises(UserError, match="café/hf is not ASCII, and with .* do not find it; set PYTHONUTF8=1"):
        export(memory_state(), tmp_path / "café/hf")
    export(memory_state(), tmp_path / "coffee/hf")


def test_only_an_earlier_export_is_overwritten(tmp_path):
    """`export_hf runs/x runs/x --overwrite` would else remove the run with all its checkpoints."""
    (tmp_path / "run/step_00000001").mkdir(parents=True)
    (tmp_path / "run/step_00000001/metadata.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name in ("run", "run/step_00000001", "file"):
        with pytest.raises(UserError, match="not an exported folder"):
            export(memory_state(), tmp_path / name, overwrite=True)
        assert (tmp_path / name).exists()
    (tmp_path / "empty").mkdir()
    export(memory_state(), tmp_path / "empty", overwrite=True)


def test_an_existing_folder_is_kept_unless_overwritten(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/precious").write_text("x")
    with pytest.raises(UserError, match="--overwrite"):
        export(memory_state(), tmp_path / "hf")
    assert (tmp_path / "hf/precious").exists()
    (tmp_path / "hf/config.json").write_text("{}")  # an earlier export
    export(memory_state(), tmp_path / "hf", overwrite=True)
    assert (tmp_path / "hf/config.json").exists() and not (tmp_path / "hf/precious").exists()


def test_an_earlier_export_is_replaced_at_once_and_behind_a_link(tmp_path, monkeypatch):
    """Nothing half deleted stands under the name, whenever the program is killed; a link stays a link."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/hf").mkdir()
    (tmp_path / "disk/hf/config.json").write_text("earlier")
    (tmp_path / "hf").symlink_to("disk/hf")
    seen = []

    def remove(path, ignore_errors=False):
        seen.append((tmp_path / "hf/config.json").read_text())
        shutil.rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(whole_folder, "shutil", SimpleNamespace(rmtree=remove))
    export(memory_state(), tmp_path / "hf", overwrite=True)
    assert seen and all(json.loads(text)["model_type"] == "taipan" for text in seen)
    assert (tmp_path / "hf").is_symlink() and os.listdir(tmp_path / "disk") == ["hf"]


@pytest.mark.parametrize("program", ["export_hf", "reshard", "import_hf", "import_mamba2"])
def test_what_cannot_be_written_is_one_line(program, tmp_path, monkeypatch, capsys):
    state = memory_state("M S")
    source = tmp_path / "source"
    if program == "import_hf":
        map_weights(state.config.model, Source("MS", shapes_of(state), state.load), source, 0)
    elif program != "import_mamba2":
        write_checkpoint(source, state.config, state.load)
    options = {"export_hf": ["--no-tokenizer", "--max-shard-gb", "inf"]}.get(program, [])
    if program == "import_mamba2":
        (tmp_path / "c.yaml").write_text(dump_config(state.config))
        options = ["--config", str(tmp_path / "c.yaml")]
        tensors = Source("MS", shapes_of(state), state.load)
        monkeypatch.setattr("checkpoints.import_mamba2.open_source", lambda *_: tensors)
    run = importlib.import_module(f"checkpoints.{program}").main
    (tmp_path / "file").write_text("")
    assert run([str(source), str(tmp_path / "file/out"), *options]) == 2
    assert re.fullmatch(r"error: .*file/out was not written: [^\n]*\n", capsys.readouterr().err)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TensorFile, "put", full)
    assert run([str(source), str(tmp_path / "out/x"), *options]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out/x was not written: No space left on device\n"
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def shapes_of(state: MemoryState) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.weights.items()}


def test_a_tokenizer_with_more_pieces_than_the_model_has_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"600 tokens.*{VOCABULARY}"):
        export(memory_state(), tmp_path / "hf", tokenizer=train_sentencepiece(tmp_path))


def test_the_data_says_whose_tokenizer_it_is_and_which_token_ends_a_text(tmp_path, capsys):
    tokenizer = train_sentencepiece(tmp_path)
    state = memory_state("M S", vocab_size=600)
    source = DataSource(prefix=str(tmp_path / "data"))
    state.config = state.config.model_copy(
        update={"data": state.config.data.model_copy(update={"train": [source], "tokenizer": str(tokenizer)})}
    )
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    manifest = MANIFEST | {"shards": [{"prefix": "data"}], "options": {"bos": None, "eod": 1}}
    (tmp_path / "data.json").write_text(json.dumps(manifest | {"tokenizer": {"name": "t", "sha256": digest}}))
    assert find_tokenizer(state, None) == tokenizer
    assert model_tokenizer(tokenizer, state.config.data).end_ids == (1,)
    assert model_tokenizer(tokenizer).end_ids == (2,)
    export(state, tmp_path / "hf", tokenizer=tokenizer)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == 1
    other = tmp_path / "other.model"
    other.write_bytes(b"another")
    path = write_checkpoint(tmp_path / "run", state.config, state.load)
    assert main([str(path), str(tmp_path / "hf2"), "--tokenizer", str(other)]) == 2
    error = capsys.readouterr().err
    assert "--tokenizer: " in error and "is not the tokenizer that" in error and error.count("\n") == 1
    assert not (tmp_path / "hf2").exists()


def test_a_checkpoint_with_a_changed_weight_is_not_exported(tmp_path, capsys):
    state = memory_state("M S")
    path = write_checkpoint(tmp_path / "run", state.config, state.load)
    weights = path / "state/rank_00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main([str(tmp_path / "run"), str(tmp_path / "hf"), "--no-tokenizer"]) == 2
    assert "rank_00000.safetensors changed since it was written" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_the_program_reports_a_missing_checkpoint_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(tmp_path / "hf")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
