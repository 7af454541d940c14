"""Corpora by name: what `--recipe` reads, what comes before it, which sets are refused, and the paper's mix of them."""

import json

import numpy as np
import pytest

from data_prep import cli
from data_prep.corpora import EVALUATION_SETS, evaluation_set
from data_prep.recipes import load_recipe, names
from megatron_taipan.config_loading import load_config
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.tokenizer.load import load_tokenizer
from tests.data_prep.test_recipes import CASES
from tests.distributed.launch import ROOT

ARTICLE = {"id": "1", "url": "u", "title": "April", "text": "April is a month."}


def tokenize(folder, model, *args, output="o"):
    given = ["tokenize", "--tokenizer", model, "--output", folder / output, *args]
    return cli.main([str(arg) for arg in given])


def text_of(folder, model, output="o"):
    return load_tokenizer(model).decode(IndexedReader(str(folder / output)).document(0).tolist())


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the hub, which gives one article."""
    import datasets

    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return iter([ARTICLE])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_recipe_reads_its_own_source(tmp_path, model, hub, capsys):
    assert tokenize(tmp_path, model, "--recipe", "wikipedia") == 0
    assert hub == [(("wikimedia/wikipedia", "20231101.en"), {"split": "train", "streaming": True})]
    assert text_of(tmp_path, model) == "April\n\nApril is a month."
    assert "reads hub:wikimedia/wikipedia:20231101.en:train (licence: CC BY-SA 3.0 and GFDL)" in capsys.readouterr().out


def test_explicit_arguments_come_before_the_recipe_and_a_line_says_so(tmp_path, model, hub, capsys):
    (tmp_path / "in.jsonl").write_text(json.dumps(ARTICLE | {"title": "May"}) + "\n")
    given = ["--recipe", "wikipedia", "--input", tmp_path / "in.jsonl"]
    assert tokenize(tmp_path, model, *given) == 0 and hub == []
    assert text_of(tmp_path, model) == "May\n\nApril is a month."
    assert "reads --input, and not its source wikimedia/wikipedia" in capsys.readouterr().out
    for output, option, text in (("a", ("--text-field", "title"), "May"), ("b", ("--template", "{id}"), "1")):
        assert tokenize(tmp_path, model, *given, *option, output=output) == 0
        assert text_of(tmp_path, model, output) == text
        assert f"the text is what {option[0]} says, and not the recipe" in capsys.readouterr().out
    assert tokenize(tmp_path, model, *given, "--text-field", "title") == 2, "another text than that of the output"
    assert "made from other inputs, options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "why"), [([], "give --input, or --recipe NAME"), (["--recipe", "longqa"], "no source")]
)
def test_nothing_to_read(tmp_path, model, capsys, given, why):
    assert tokenize(tmp_path, model, *given) == 2
    assert why in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_bookscorpus_is_read_from_the_hubs_conversion(tmp_path, monkeypatch):
    """Its repository holds a loading script, which the library does not run; the address is a branch's files."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile, RepoFolder

    from data_prep import remote

    asked = set()
    files = [f"plain_text/train/{number:04}.parquet" for number in range(10)]

    def tree(self, repo_id, path_in_repo=None, *, revision=None, **_):
        asked.add((repo_id, revision))
        if path_in_repo == "plain_text/train":
            return [RepoFile(path=path, size=5, oid=path) for path in files]
        return [RepoFolder(path="plain_text/train" if path_in_repo else "plain_text", oid="c")]

    monkeypatch.setattr(HfApi, "list_repo_tree", tree)
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: None)
    found = remote.find(load_recipe("bookscorpus").input, str(tmp_path))
    root = "hf://datasets/bookcorpus/bookcorpus@refs/convert/parquet/"
    assert [source.url for source in found.values()] == [root + path for path in files]
    assert asked == {("bookcorpus/bookcorpus", "refs/convert/parquet")}


@pytest.mark.parametrize(
    "given",
    [
        ["--recipe", "squad"], ["--recipe", "swde", "--input", "IN"], ["--input", "hub:rajpurkar/squad:plain_text"],
        ["--input", "IN", "hf://datasets/allenai/ai2_arc/ARC-Easy/*.parquet"], ["--input", "hub:hellaswag"],
        ["--input", "hf://datasets/hazyresearch/based-fda@main/data"],
        ["--recipe", "wikipedia", "--input", "hub:a/PIQA"],
    ],
)  # fmt: skip
def test_what_models_are_measured_on_is_refused(tmp_path, model, hub, capsys, given):
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    given = [str(tmp_path / "in.jsonl") if one == "IN" else one for one in given]
    assert tokenize(tmp_path, model, *given) == 2
    error = capsys.readouterr().err
    assert "a set that models are measured on" in error and "give --allow-evaluation-data" in error
    assert ("no recipe: --template" in error) == (given[1] in ("squad", "swde"))
    assert hub == [] and [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_models_are_measured_on_is_read_where_that_is_asked_for(tmp_path, model, capsys):
    (tmp_path / "squad.jsonl").write_text(json.dumps(CASES["squad"].row) + "\n")
    given = ["--recipe", "squad", "--input", tmp_path / "squad.jsonl"]
    assert tokenize(tmp_path, model, *given, "--allow-evaluation-data") == 0
    assert "do not report results on it" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["options"]["recipe"] == "squad"


def test_sets_are_known_by_their_names_on_the_hub():
    for name in ("hub:some/set", "squad.jsonl", "/data/race/x.jsonl", "hf://datasets/me/traces/squad/x.parquet", "-"):
        assert evaluation_set(name) == ""
    # as the tasks of lm-evaluation-harness 0.4.13 load them
    loaded = """allenai/winogrande baber/piqa Rowan/hellaswag allenai/ai2_arc allenai/openbookqa truthfulqa/truthful_qa
        EleutherAI/race aps/super_glue hazyresearch/based-swde-v2 hazyresearch/based-fda hazyresearch/based-squad
        EleutherAI/drop mandarjoshi/trivia_qa google-research-datasets/nq_open lighteval/squad_v2"""
    assert all(evaluation_set(f"hub:{name}:x:test") for name in loaded.split())
    for recipe in map(load_recipe, names()):
        assert bool(evaluation_set(recipe.input or "")) == (recipe.purpose == "evaluation")
    assert all(name == name.lower() for name in EVALUATION_SETS)


def test_the_list(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(names())
    [line] = [line for line in lines if line.startswith("fda ")]
    assert line.split()[:5] == ["fda", "evaluation", "1.1", "k", "8.5"]
    assert "28 B" in "".join(lines) and "213 GB" in "".join(lines) and "4.85 GB" in "".join(lines)
    assert cli.main(["recipes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found) == names() and found["wikipedia"]["input"] == "hub:wikimedia/wikipedia:20231101.en:train"
    assert {found["squad"]["purpose"], found["wikipedia"]["purpose"]} == {"evaluation", "training"}


def test_the_papers_mix_takes_each_corpus_by_its_tokens(tmp_path, model):
    """From rows of the cards' types to samples, by the shipped file: each corpus's share is its share of all tokens."""
    mix = load_config(ROOT / "launch/configs/paper_mix.yaml")
    prefixes = {source.prefix: source for source in mix.data.train}
    paper = [name for name in CASES if load_recipe(name).purpose == "training" and name != "bookscorpus"]
    assert len(prefixes) == len(paper) == 8 and {source.weight for source in prefixes.values()} == {"tokens"}
    tokens = {}
    for number, name in enumerate(paper):
        recipe = name.replace("starcoderdata_", "").replace("wikipedia", "wikipedia_en")  # the presets' names
        assert f"data/{recipe}" in prefixes
        (tmp_path / "in.jsonl").write_text((json.dumps(CASES[name].row, default=str) + "\n") * (200 + 150 * number))
        given = ["--recipe", name, "--input", tmp_path / "in.jsonl", "--append-eod", "--workers", "1"]
        assert tokenize(tmp_path, model, *given, output=recipe) == 0
        tokens[f"data/{recipe}"] = IndexedReader(str(tmp_path / recipe)).n_tokens
    sources = [
        f"{{prefix: {tmp_path}/{prefix.removeprefix('data/')}, weight: tokens, loss_mask: {source.loss_mask}}}"
        for prefix, source in prefixes.items()
    ]
    given = [f"data.train=[{', '.join(sources)}]", "data.seq_len=32", "data.workers=0", "data.valid_fraction=0"]
    config = load_config(ROOT / "launch/configs/paper_mix.yaml", given)
    data = build_dataset(config.data, "train", 2000)
    drawn = np.array(data.blend.drawn(2000)) / 2000
    expected = np.array([tokens[prefix] for prefix in prefixes]) / sum(tokens.values())
    assert np.abs(drawn - expected).max() < 0.001 and drawn.min() > 0
