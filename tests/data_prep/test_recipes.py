"""Every shipped recipe turns its example record into the text that it says."""

import argparse
import json

import pytest

from data_prep import cli
from data_prep.extract import extractor
from data_prep.recipes import load_recipe, names
from megatron_taipan.errors import UserError

TYPES = {"str": str, "int": int, "float": float, "dict": dict, "list": list}


@pytest.mark.parametrize("name", names())
def test_recipe(name):
    recipe = load_recipe(name)
    assert recipe.licence and recipe.source and recipe.about
    assert recipe.example.keys() == recipe.schema.keys()
    assert all(isinstance(recipe.example[field], TYPES[kind]) for field, kind in recipe.schema.items())
    extract = extractor(argparse.Namespace(text_field=None, template=None, recipe=name))
    assert extract(json.loads(json.dumps(recipe.example))) == recipe.renders


def test_all_corpora_of_the_paper_have_one():
    assert len(names()) == 13


def test_recipe_on_the_command_line(tmp_path, capsys):
    recipe = load_recipe("squad")
    (tmp_path / "in.jsonl").write_text((json.dumps(recipe.example) + "\n") * 200)
    model = tmp_path / "t.model"
    args = ["--input", str(tmp_path / "in.jsonl"), "--recipe", "squad"]
    assert cli.main(["train-tokenizer", *args, "--output", str(model), "--vocab-size", "370"]) == 0
    assert cli.main(["tokenize", *args, "--tokenizer", str(model), "--output", str(tmp_path / "o")]) == 0
    assert cli.main(["inspect", str(tmp_path / "o"), "--tokenizer", str(model), "--full", "--documents", "1"]) == 0
    assert recipe.renders.replace("\n", "\\n") in capsys.readouterr().out


def test_bad_recipes(tmp_path):
    with pytest.raises(UserError, match="shipped are"):
        load_recipe("nothing")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\nfoo: y\n")
    with pytest.raises(UserError, match="foo"):
        load_recipe(str(bad))
