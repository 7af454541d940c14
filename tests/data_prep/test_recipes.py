"""Every shipped recipe turns its example record into the text that it says."""

import argparse
import json
from datetime import datetime

import pytest

from data_prep import cli
from data_prep.extract import extractor
from data_prep.kinds.records import Slice
from data_prep.readers import read_records
from data_prep.recipes import FOLDER, load_recipe, names
from megatron_taipan.errors import UserError


def arrow(kind):
    """The arrow type of a schema's entry."""
    import pyarrow

    if isinstance(kind, dict):
        return pyarrow.struct([(name, arrow(inner)) for name, inner in kind.items()])
    if isinstance(kind, list):
        return pyarrow.list_(arrow(kind[0]))
    types = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64()}
    return types.get(kind) or pyarrow.timestamp("s")


def typed(value, kind):
    """A value of the example as the corpus would hold it."""
    if isinstance(kind, dict):
        assert value.keys() == kind.keys()
        return {name: typed(value[name], inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        return [typed(inner, kind[0]) for inner in value]
    return datetime.fromisoformat(value) if kind == "timestamp" else value


@pytest.mark.parametrize("name", names())
def test_recipe(tmp_path, name):
    """The example, as a line of JSON and as a row of a parquet file of the corpus's own types, gives its text."""
    import pyarrow
    from pyarrow import parquet

    recipe = load_recipe(name)
    assert recipe.licence and recipe.source and recipe.about and recipe.verified
    row = typed(recipe.example, recipe.schema)
    schema = pyarrow.schema([(field, arrow(kind)) for field, kind in recipe.schema.items()])
    parquet.write_table(pyarrow.Table.from_pylist([row], schema), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text(json.dumps(recipe.example))
    extract = extractor(argparse.Namespace(text_field=None, template=None, recipe=name))
    for path in (tmp_path / "x.parquet", tmp_path / "x.jsonl"):
        (record,) = read_records(Slice(str(path), 0, path.stat().st_size), extract)
        assert (with_marks(record.text, record.borders), record.problem) == (recipe.renders, "")


def with_marks(text, borders):
    """A text with the template's marks at its borders."""
    out = text[: (borders or (len(text),))[0]]
    for number, begin in enumerate(borders):
        end = (*borders, len(text))[number + 1]
        out += text[begin:end] if number % 2 else f"{{% generation %}}{text[begin:end]}{{% endgeneration %}}"
    return out


@pytest.mark.parametrize("name", ["squad", "longqa", "swde", "fda", "metamathqa"])
def test_of_questions_only_the_answer_is_learned(name):
    """The template is the mark's only source: what of the example is no prompt, with the blank before it."""
    recipe = load_recipe(name)
    found = extractor(argparse.Namespace(text_field=None, template=None, recipe=name))(recipe.example)
    answers = {"squad": "1932", "longqa": "A report.", "swde": "Ozu", "fda": "new device"}
    [border] = found.borders
    assert found.text[border:] == " " + answers.get(name, recipe.example.get("response", ""))
    assert found.text[:border].endswith(":")


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
    shown = recipe.renders.replace("{% generation %}", "\u27e6").replace("{% endgeneration %}", "\u27e7")
    assert shown.replace("\n", "\\n") in capsys.readouterr().out


def test_a_changed_recipe_file_is_another_corpus(tmp_path, capsys):
    """Else a run that goes on after the file was repaired would mix texts of both, or call the old one complete."""
    mine, shipped = tmp_path / "mine.yaml", FOLDER / "squad.yaml"
    mine.write_text(shipped.read_text())
    (tmp_path / "in.jsonl").write_text(json.dumps(load_recipe("squad").example) + "\n")
    args = ["--input", str(tmp_path / "in.jsonl"), "--recipe", str(mine)]
    model = tmp_path / "t.model"
    assert cli.main(["train-tokenizer", *args, "--output", str(model), "--vocab-size", "360"]) == 0
    args += ["--tokenizer", str(model), "--output", str(tmp_path / "o")]
    assert cli.main(["tokenize", *args]) == 0
    assert cli.main(["tokenize", *args]) == 0 and "complete already" in capsys.readouterr().out
    mine.write_text(shipped.read_text().replace("Question", "Q"))
    assert load_recipe(str(mine)).template != load_recipe("squad").template
    assert cli.main(["tokenize", *args]) == 2 and "made from other inputs, options" in capsys.readouterr().err


def test_bad_recipes(tmp_path):
    with pytest.raises(UserError, match="shipped are"):
        load_recipe("nothing")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\nfoo: y\n")
    with pytest.raises(UserError, match="foo"):
        load_recipe(str(bad))
