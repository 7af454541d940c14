"""An export of a folder: an earlier export, an import, a model that was changed since. And a folder's checksums."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import chat_template, verify
from checkpoints import tokenizer as tokenizer_module
from checkpoints.checksums import SUMS
from checkpoints.export_hf import export, main
from checkpoints.map_weights import Source, map_weights
from megatron_taipan.errors import UserError
from tests.checkpoints.made import memory_state, train_sentencepiece
from tests.checkpoints.test_text_of_exports import TEMPLATE, data_of, tokenize


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tokenizer, data that begins documents with BOS, a state's export, and what it was made of."""
    place = tmp_path_factory.mktemp("again")
    model = train_sentencepiece(place)
    prefix = tokenize(place, "data", model, "--prepend-bos", "--append-eod")
    (place / "chat.jinja").write_text(TEMPLATE)
    state = memory_state("M S", vocab_size=600)
    state.config = state.config.model_copy(update={"data": data_of(prefix)})
    export(state, place / "hf", tokenizer=model, template=place / "chat.jinja")
    return place


def test_the_export_declares_what_the_data_had(place):
    for file in ("config.json", "generation_config.json"):
        said = json.loads((place / "hf" / file).read_text())
        assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"]) == (1, 2, 2)
    card = (place / "hf/README.md").read_text()
    assert "`<s>` came before each training document, and is put before a prompt" in card
    assert "`</s>` came after each" in card and "split_special_tokens=True" in card
    assert "apply_chat_template" in card


def test_an_export_is_exported_to_another_type(place, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(place / "hf", source)
    settings = json.loads((source / "generation_config.json").read_text()) | {"temperature": 0.5}
    (source / "generation_config.json").write_text(json.dumps(settings))  # by its user, and meant
    card = (source / "README.md").read_text() + "A line of the user's.\n"
    (source / "README.md").write_text(card)
    assert main([str(source), str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    said = capsys.readouterr().err
    assert (
        f"note: taken over from {source} as it is: tokenizer.json, tokenizer_config.json, chat_template.jinja,"
        " generation_config.json, README.md\n" in said
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "bf16" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "bf16/README.md").read_text() == card.replace("in float32, trained", "in bfloat16, trained")
    wide, lower = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "bf16"))
    assert all(torch.equal(lower[name], tensor.to(lower[name].dtype)) for name, tensor in wide.items())
    fp32_params = {name for name, tensor in lower.items() if tensor.dtype == torch.float32}
    assert {"model.layers.0.mixer.A_log", "model.layers.1.gate.weight"} <= fp32_params < lower.keys() == wide.keys()
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("bf16", "source"))
    assert ours == theirs | {"dtype": "bfloat16"}


def test_a_model_that_transformers_saved_is_exported(place, tmp_path):
    """As a fine-tuning program leaves it: other weights, a tokenizer that transformers wrote."""
    model = AutoModelForCausalLM.from_pretrained(place / "hf", trust_remote_code=True)
    with torch.no_grad():
        model.model.final_norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(place / "hf", trust_remote_code=True).save_pretrained(tmp_path / "tuned")
    assert main([str(tmp_path / "tuned"), str(tmp_path / "hf")]) == 0
    assert torch.equal(
        load_file(tmp_path / "hf/model.safetensors")["model.final_norm.weight"], model.model.final_norm.weight
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert tokenizer("x</s>")["input_ids"][0] == 1 and tokenizer("x</s>")["input_ids"][-1] == 2
    assert tokenizer.chat_template == TEMPLATE
    assert "training: not recorded" in (tmp_path / "hf/README.md").read_text()


def test_imported_weights_are_exported_with_a_tokenizer(place, tmp_path, capsys):
    state = memory_state("M S", vocab_size=600)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
    map_weights(state.config.model, Source("MS", shapes, state.load), tmp_path / "weights", 0)
    arguments = ["--tokenizer", str(place / "tok.model"), "--chat-template", str(place / "chat.jinja")]
    assert main([str(tmp_path / "weights"), str(tmp_path / "bare")]) == 0
    assert "nothing but the weights" in capsys.readouterr().err
    assert not list((tmp_path / "bare").glob("tokenizer*"))
    assert main([str(tmp_path / "weights"), str(tmp_path / "hf"), *arguments]) == 0
    bare, full = (load_file(tmp_path / name / "model.safetensors") for name in ("bare", "hf"))
    assert all(torch.equal(full[f"model.{name}"], tensor) for name, tensor in state.weights.items())
    assert bare.keys() == full.keys()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.bos_token is None


def test_what_cannot_be_exported_of_a_folder_is_refused(place, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(place / "hf", source)
    weights = load_file(source / "model.safetensors")
    save_file(
        weights | {"model.final_norm.weight": weights["model.final_norm.weight"] + 1}, source / "model.safetensors"
    )
    assert main([str(source), str(tmp_path / "out")]) == 2
    assert "is damaged: model.safetensors changed since it was written" in capsys.readouterr().err
    (source / SUMS).unlink()  # then nobody knows, and the user may have meant it
    assert (
        main([str(source), str(tmp_path / "out"), "--no-tokenizer", "--chat-template", str(place / "chat.jinja")]) == 2
    )
    assert "needs a tokenizer" in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "out"), "--chat-template", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("size", ["0", "-1", "nan", "-inf"])
@pytest.mark.parametrize("option", ["--max-shard-gb", "--stream-above-gb"])
def test_a_size_that_is_none_is_refused(place, tmp_path, capsys, size, option):
    if (option, size) == ("--stream-above-gb", "0"):
        return  # every model is above it
    assert main([str(place / "hf"), str(tmp_path / "out"), f"{option}={size}"]) == 2
    assert f"{option}={size} is not a size; give" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_checksums_are_those_of_sha256sum(place):
    done = subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=place / "hf", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    listed = {line.split("  ")[1] for line in (place / "hf" / SUMS).read_text().splitlines()}
    assert listed == {path.name for path in (place / "hf").iterdir()} - {"README.md", SUMS}


def test_verify_names_what_is_damaged_missing_or_too_much(place, tmp_path, capsys):
    copy = tmp_path / "hf"
    shutil.copytree(place / "hf", copy)
    (copy / "README.md").write_text("another card")
    (copy / ".gitattributes").write_text("")
    assert verify.main([str(copy)]) == 0
    assert "good (" in capsys.readouterr().out
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    (copy / "tokenizer.json").unlink()
    (copy / "model-00001-of-00002.safetensors").write_bytes(content)
    (copy / "pytorch_model.bin").write_bytes(b"")
    assert verify.main([str(copy)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{copy}  model.safetensors changed since it was written",
        f"{copy}  tokenizer.json is missing",
        f"{copy}  model-00001-of-00002.safetensors is not part of the export, and might be loaded instead of it",
        f"{copy}  pytorch_model.bin is not part of the export, and might be loaded instead of it",
    ]
    for damaged in ("0123  a\n", "\n", f"{'0' * 64}  ../a\n"):
        (copy / SUMS).write_text(damaged)
        assert verify.main([str(copy)]) == 2
        assert "line 1 is not a SHA-256 and a file name" in capsys.readouterr().err
    (copy / SUMS).unlink()
    assert verify.main([str(copy)]) == 2
    assert f"holds no {SUMS}" in capsys.readouterr().err


def test_a_template_that_writes_something_else_from_the_folder_is_found(place, tmp_path, monkeypatch):
    """The check asks the folder's own tokenizer, not what was read from the file."""
    right = chat_template.read_template
    monkeypatch.setattr(chat_template, "read_template", lambda *given: (right(*given)[0] + "!", right(*given)[1]))
    state = memory_state("M S", vocab_size=600)
    with pytest.raises(UserError, match="apply_chat_template writes"):
        export(state, tmp_path / "hf", tokenizer=place / "tok.model", template=place / "chat.jinja")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_puts_no_bos_where_the_data_had_one_is_found(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "begin_with", lambda *_: None)
    state = memory_state("M S", vocab_size=600)
    state.config = state.config.model_copy(update={"data": data_of(str(place / "data"))})
    with pytest.raises(UserError, match="does not put <s> before a text"):
        export(state, tmp_path / "hf", tokenizer=place / "tok.model")
    assert list(tmp_path.iterdir()) == []
