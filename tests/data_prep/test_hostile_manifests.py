"""Manifests of data that say what they must not: one line, and nothing outside the folder is read or deleted."""

import json

import pytest

from data_prep import cli, manifest
from megatron_taipan.data.manifests import manifest_of, named_shards
from megatron_taipan.data.sources import open_reader
from megatron_taipan.errors import UserError
from tests.train.toy import write_data

OUTSIDE = ["../secret", "/secret", "..", "a/../../secret", 7, None]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_of_data_that_names_other_places_is_refused_and_nothing_is_deleted(tmp_path, name, model, capsys):
    """`tokenize --overwrite` deletes the shards that the manifest before names."""
    write_data(tmp_path / "secret")
    home = tmp_path / "home"
    home.mkdir()
    (home / "x.jsonl").write_text('{"text": "a document"}\n')
    args = ["tokenize", "--input", str(home / "x.jsonl"), "--tokenizer", model, "--output", str(home / "o")]
    assert cli.main(args) == 0
    content = json.loads((home / "o.json").read_text())
    content["shards"].append(content["shards"][0] | {"prefix": str(tmp_path) + name if name == "/secret" else name})
    (home / "o.json").write_text(json.dumps(content))
    capsys.readouterr()
    for command in (
        [*args, "--overwrite", "--append-eod", "--eod-token", "</s>"],
        ["verify", str(home / "o")],
        ["stats", str(home / "o")],
    ):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "o.json" in error, error
    assert (tmp_path / "secret.bin").exists() and (tmp_path / "secret.idx").exists()
    if isinstance(name, str):
        for read in (lambda p: open_reader(p + "-x"), named_shards, manifest_of):
            with pytest.raises(UserError, match="names only pairs beside it"):
                (home / "o-x.json").write_text(json.dumps(content))
                read(str(home / "o"))
                read(str(home / "o-x"))
    with pytest.raises(UserError):
        manifest.read(str(home / "o"))


@pytest.mark.parametrize(
    "field",
    [
        "shards",
        "documents",
        "tokens",
        "tokenizer",
        "options",
        "tokenizer.vocab_size",
        "tokenizer.sha256",
        "options.eod",
    ],
)
def test_a_manifest_of_data_with_a_field_of_another_type(tmp_path, model, field, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": "a document"}\n')
    args = ["tokenize", "--input", str(tmp_path / "x.jsonl"), "--tokenizer", model, "--output", str(tmp_path / "o")]
    assert cli.main(args) == 0
    content = json.loads((tmp_path / "o.json").read_text())
    name, _, inside = field.partition(".")
    wrong = content[name] | {inside: [1]} if inside else "x"
    (tmp_path / "o.json").write_text(json.dumps(content | {name: wrong}))
    for command in (["verify", str(tmp_path / "o")], ["stats", str(tmp_path / "o")]):
        capsys.readouterr()
        assert cli.main(command) == 2
        assert f"o.json is damaged: its {field} is not " in capsys.readouterr().err
