"""Every shipped recipe makes the text that it says of a row as the corpus's own dataset card describes it.

`cards/` holds the descriptions of fields, types and sizes of those cards, each with the address where it was read; the
rows and texts below were written by hand in these types.
"""

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from data_prep import cli
from data_prep.extract import extractor
from data_prep.kinds.records import Slice
from data_prep.readers import read_records
from data_prep.recipes import EVALUATION, FOLDER, TRAINING, load_recipe, names
from megatron_taipan.errors import UserError

CARDS = Path(__file__).parent / "cards"
PAPER = {  # what arXiv 2410.18572 trained on
    "metamathqa", "numinamath_cot", "cosmopedia_v2", "fineweb_edu_dedup", "open_web_math", "starcoderdata_python_edu",
    "orca_math", "wikipedia",
}  # fmt: skip
MEASURED = {"squad", "swde", "fda"}
MORE = {"bookscorpus", "longqa"}  # of the documents that this project comes from


class Case:
    """A recipe's card (its file and configuration), a row in the card's types, and the text that it must become."""

    def __init__(self, card: str, config: str, row: dict[str, Any], text: str):
        self.card, self.config, self.row, self.text = card, config, row, text


def page(value: str, key: str) -> dict[str, Any]:
    return {"doc_id": "7", "file_name": "7.txt", "key": key, "value": value, "text": f"Page 7 of 9. {key}:"}


CASES = {
    "bookscorpus": Case("bookcorpus", "plain_text", {"text": "the rain stopped ."}, "the rain stopped ."),
    "cosmopedia_v2": Case(
        "smollm_corpus", "cosmopedia-v2",
        {"prompt": "Write of tides.", "text": "# Tides\n\nThe moon.", "token_length": 9, "audience": "children",
         "format": "story", "seed_data": "web"},
        "# Tides\n\nThe moon.",
    ),
    "fineweb_edu_dedup": Case(
        "smollm_corpus", "fineweb-edu-dedup",
        {"text": "Leaves are green.", "id": "<urn:uuid:7>", "metadata": {
            "dump": "CC-MAIN-2019-04", "url": "https://example.org/leaf", "date": datetime(2019, 1, 16, 7, 20, 1),
            "file_path": "s3://x", "language": "en", "language_score": 0.9, "token_count": 5, "score": 3.5,
            "int_score": 4,
        }},
        "Leaves are green.",
    ),
    "fda": Case(
        "based_fda", "default", page("K012345", "510(k) number"),
        "Page 7 of 9. 510(k) number:{% generation %} K012345{% endgeneration %}",
    ),
    "swde": Case(
        "based_swde", "default", page("24 minutes", "runtime"),
        "Page 7 of 9. runtime:{% generation %} 24 minutes{% endgeneration %}",
    ),
    "metamathqa": Case(
        "metamathqa", "default",
        {"type": "MATH_AnsAug", "query": "What is {2}^2?", "original_question": "2 squared?", "response": "It is 4."},
        "Question: What is {2}^2?\nAnswer:{% generation %} It is 4.{% endgeneration %}",
    ),
    "numinamath_cot": Case(
        "numinamath_cot", "default",
        {"source": "olympiads", "problem": "Find $x$.", "solution": "$\\boxed{3}$",
         "messages": [{"content": "Find $x$.", "role": "user"}, {"content": "$\\boxed{3}$", "role": "assistant"}]},
        "Problem: Find $x$.\nSolution: $\\boxed{3}$",
    ),
    "open_web_math": Case(
        "open_web_math", "default",
        {"url": "https://example.org", "text": "Let $x$ be.", "date": "2019-01-16T07:20:01", "metadata": '{"a": 1}'},
        "Let $x$ be.",
    ),
    "orca_math": Case(
        "orca_math", "default", {"question": "2 + 2?", "answer": "4."}, "Question: 2 + 2?\nAnswer: 4.",
    ),
    "squad": Case(
        "squad", "plain_text",
        {"id": "5733", "title": "Bridge", "context": "It opened in 1932.", "question": "When did it open?",
         "answers": {"text": ["1932", "in 1932"], "answer_start": [13, 10]}},
        "It opened in 1932.\n\nQuestion: When did it open?\nAnswer:{% generation %} 1932{% endgeneration %}",
    ),
    "starcoderdata_python_edu": Case(
        "python_edu_cleaned", "default",
        {"blob_id": "0a", "repo_name": "a/b", "path": "/c.py", "length_bytes": 9, "score": 4.1, "int_score": 4,
         "text": "print(1)\n"},
        "print(1)\n",
    ),
    "wikipedia": Case(
        "wikipedia", "20231101.ace",
        {"id": "12", "url": "https://en.wikipedia.org/wiki/April", "title": "April", "text": "April is a month."},
        "April\n\nApril is a month.",
    ),
}  # fmt: skip


def card_of(case: Case):
    """The features and the splits of a card, as the library `datasets` reads them."""
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCard

    return DatasetInfosDict.from_dataset_card_data(DatasetCard.load(CARDS / f"{case.card}.md").data)[case.config]


def kind_of(feature: Any) -> Any:
    """A card's feature in the words of a recipe's schema."""
    if isinstance(feature, dict):
        return {name: kind_of(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):  # a list of them
        return [kind_of(feature.feature)]
    kinds = {"string": "str", "int64": "int", "int32": "int", "float64": "float"}
    return kinds.get(feature.dtype, feature.dtype.partition("[")[0])


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_the_cards_types_gives_its_text(tmp_path, name):
    """As a parquet file of the card's arrow types, and as the line of JSON that a stream from the hub is kept as."""
    from datasets import Dataset

    from data_prep.stream_cache import _packed

    case = CASES[name]
    rows = Dataset.from_list([case.row], features=card_of(case).features)
    rows.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_bytes(_packed(rows[0]))
    extract = extractor(argparse.Namespace(text_field=None, template=None, recipe=name))
    for path in (tmp_path / "x.parquet", tmp_path / "x.jsonl"):
        (record,) = read_records(Slice(str(path), 0, path.stat().st_size), extract)
        assert (with_marks(record.text, record.borders), record.problem) == (case.text, "")


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_says_of_fields_parts_and_size_what_the_card_says(name):
    recipe, case = load_recipe(name), CASES[name]
    card = card_of(case)
    assert recipe.schema == kind_of(card.features)
    if name == "swde":  # the version that is read has no card here
        assert recipe.split in card.splits and (recipe.documents, recipe.bytes) == (None, None)
        return
    if name == "wikipedia":  # the card's entry is that of another language
        assert recipe.config == "20231101.en"
        return
    if "://" not in recipe.source:
        assert (recipe.config or "default") == case.config
    split = card.splits[recipe.split]
    assert recipe.documents == split.num_examples
    assert recipe.bytes == (int(split.num_bytes) if split.num_bytes else None)


@pytest.mark.parametrize("name", names())
def test_the_example_of_a_recipe_gives_what_it_says(tmp_path, name):
    recipe = load_recipe(name)
    assert recipe.licence and recipe.source and recipe.about and recipe.verified
    typed(recipe.example, recipe.schema)
    (tmp_path / "x.jsonl").write_text(json.dumps(recipe.example))
    extract = extractor(argparse.Namespace(text_field=None, template=None, recipe=name))
    (record,) = read_records(Slice(str(tmp_path / "x.jsonl"), 0, (tmp_path / "x.jsonl").stat().st_size), extract)
    assert (with_marks(record.text, record.borders), record.problem) == (recipe.renders, "")


def typed(value, kind):
    """Fails where a value of the example is not of its type in the schema."""
    if isinstance(kind, dict):
        assert value.keys() == kind.keys()
        for name, inner in kind.items():
            typed(value[name], inner)
    elif isinstance(kind, list):
        for one in value:
            typed(one, kind[0])
    else:
        assert isinstance(value, {"int": int, "float": float}.get(kind, str))
        if kind == "timestamp":
            datetime.fromisoformat(value)


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


def test_every_corpus_of_the_paper_has_one():
    assert set(names()) == PAPER | MEASURED | MORE
    assert {name for name in names() if load_recipe(name).purpose == TRAINING} == PAPER | MORE
    assert {name for name in names() if load_recipe(name).purpose == EVALUATION} == MEASURED
    assert set(CASES) == set(names()) - {"longqa"}, "a schema of our own has no card"


def test_the_page_on_corpora_has_each():
    text = (Path(__file__).parents[2] / "docs/corpora.md").read_text(encoding="utf-8")
    for name in names():
        recipe = load_recipe(name)
        assert f"| `{name}` |" in text, name
        assert recipe.input is None or recipe.input in text, name


def test_recipe_on_the_command_line(tmp_path, capsys):
    recipe = load_recipe("squad")
    (tmp_path / "in.jsonl").write_text((json.dumps(recipe.example) + "\n") * 200)
    model = tmp_path / "t.model"
    args = ["--input", str(tmp_path / "in.jsonl"), "--recipe", "squad"]
    assert cli.main(["train-tokenizer", *args, "--output", str(model), "--vocab-size", "370"]) == 0
    args += ["--allow-evaluation-data", "--tokenizer", str(model)]
    assert cli.main(["tokenize", *args, "--output", str(tmp_path / "o")]) == 0
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
    args += ["--allow-evaluation-data", "--tokenizer", str(model), "--output", str(tmp_path / "o")]
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
    shipped = (FOLDER / "fda.yaml").read_text()
    for line, why in (("documents: 1102", "documents: many"), ("purpose: evaluation", "purpose: fun")):
        bad.write_text(shipped.replace(line, why))
        with pytest.raises(UserError, match="documents is not a whole number|'fun'; it must be training or evaluation"):
            load_recipe(str(bad))
