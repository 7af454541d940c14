"""Retrieval: the texts are what they claim to be, and results, tables and pictures hold what was counted."""

import json
import random
import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation import retrieval_prompts as prompts
from megatron_taipan.evaluation.__main__ import main as evaluate
from megatron_taipan.evaluation.retrieval import draw_figures, main
from megatron_taipan.evaluation.text_models import TextModel
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.tokenizer.load import load_tokenizer_file
from tests.checkpoint.test_weights import write_weights
from tests.checkpoints.made import train_sentencepiece
from tests.evaluation.readers import read_pairs, read_prompt, reading_generate
from tests.evaluation.test_qa import SAMPLE
from tests.inference.networks import small_config

BUILT_IN = prompts.read_filler(None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An export whose samples had 600 tokens."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_weights(folder, Taipan(small_config("M S", vocab_size=600)))
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"tokens_per_sample": 600}))
    return folder


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", prompts.DEPTH_KINDS)
@pytest.mark.parametrize("length", [500, 1500])
def test_a_text_fills_its_length_and_holds_the_value_once_at_its_depth(tokenizer, kind, depth, length):
    codec = load_tokenizer_file(tokenizer)
    example = prompts.DEPTH_KINDS[kind](codec, length, depth, random.Random(3), BUILT_IN)
    text = codec.decode(example.prompt).strip()
    assert length - 60 < len(example.prompt) <= length
    assert read_prompt(text) == example.value
    assert text.count(example.value) == (2 if kind == "passkey" else 1)  # which says it twice
    asked_at = text.index(example.value) / text.rindex("\n\n" if kind == "phonebook" else "What is")
    assert abs(asked_at - depth) < 0.12


def test_a_phonebook_names_nobody_twice_and_shows_two_of_its_lines(tokenizer):
    codec = load_tokenizer_file(tokenizer)
    text = codec.decode(prompts.make_phonebook(codec, 1500, 0.5, random.Random(1), BUILT_IN).prompt).strip()
    book, asked = text.split("\n\n")
    lines, (*shots, name) = book.split("\n"), asked.split("\n")
    assert len({line.split(":")[0] for line in lines}) == len(lines) > 20
    assert all(re.fullmatch(r"[A-Z][a-z]+ [A-Z]\. [A-Z][a-z]+: \d{3}-\d{3}-\d{4}", line) for line in lines)
    assert len(set(shots)) == 2 and set(shots) < set(lines) and not any(line.startswith(name) for line in shots)
    names = len(prompts.FIRST_NAMES) * len(prompts.INITIALS) * len(prompts.LAST_NAMES)
    assert len({prompts.full_name(i) for i in range(names)}) == names


@pytest.mark.parametrize("pairs", [1, 6, 20])
def test_every_key_of_a_row_is_asked_once_and_its_places_are_its_value(tokenizer, pairs):
    codec = load_tokenizer_file(tokenizer)
    row = prompts.make_recall(codec, 900, pairs, random.Random(pairs), BUILT_IN)
    text = codec.decode(row.tokens).strip()
    told = [line.split() for line in text.split(". ")[:pairs]]
    assert 900 - 40 < len(row.tokens) <= 900 and len(row.values) == pairs == len({key for key, _ in told})
    for (key, value), place in zip(told, row.values, strict=True):
        assert codec.decode(row.tokens[place.start : place.stop]).strip(" .") == value
        assert codec.decode(row.tokens[: place.start]).split()[-1] == key
        assert len(re.findall(rf"\b{key}\b", text)) == 2
    assert read_pairs(codec, row) == pairs


def test_what_does_not_fit_is_said_before_a_model_is_read(tokenizer, model, capsys):
    codec = load_tokenizer_file(tokenizer)
    with pytest.raises(UserError, match="as many words"):
        prompts.make_recall(codec, 9000, 2000, random.Random(0), BUILT_IN)
    for arguments, words in (
        (["--lengths", "40", "--kinds", "needle"], "needle: needle and question"),
        (["--lengths", "100", "--kinds", "recall", "--pairs", "30"], "30 pairs, each twice, do not fit into 100"),
        (["--kinds", "needel"], "'needel' is none of passkey, needle"),
        (["--pairs", "4,x"], "--pairs=4,x must be whole numbers"),
        (["--samples", "0"], "--samples=0 must be at least 1"),
        (["--filler", str(model / "model.safetensors")], "cannot read the filler"),
    ):
        assert main([str(model), "--tokenizer", str(tokenizer), *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert main([str(model)]) == 2 and "names no tokenizer" in capsys.readouterr().err


def test_too_few_names_for_the_longest_phonebook_are_said_before_a_model_is_read(tokenizer, model, monkeypatch, capsys):
    for names in ("FIRST_NAMES", "LAST_NAMES"):
        monkeypatch.setattr(prompts, names, ["Ada"])
    monkeypatch.setattr(TextModel, "load", lambda *_: pytest.fail("the weights were read"))
    arguments = [str(model), "--tokenizer", str(tokenizer), "--kinds", "phonebook", "--lengths", "300,2K"]
    assert main(arguments) == 2
    assert "a phonebook of 2,048 tokens needs more than the 26 names there are" in capsys.readouterr().err


def test_a_text_of_ones_own_is_the_filler_in_its_order(tokenizer, tmp_path):
    codec = load_tokenizer_file(tokenizer)
    (tmp_path / "own.txt").write_text("One is first.  Two\nis second! Three is third?\n\n Four is last. ")
    filler = prompts.read_filler(tmp_path / "own.txt")
    assert filler.sentences == ["One is first.", "Two is second!", "Three is third?", "Four is last."]
    text = codec.decode(prompts.make_needle(codec, 300, 1.0, random.Random(0), filler).prompt)
    assert "Two is second! Three is third? Four is last. One is first." in text
    (tmp_path / "own.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        prompts.read_filler(tmp_path / "own.txt")


def test_counts_tables_and_pictures_of_two_models(tokenizer, model, tmp_path, monkeypatch, capsys):
    """The first cannot read, the second reads everything."""
    codec, loaded = load_tokenizer_file(tokenizer), []
    import megatron_taipan.evaluation.found_again as found_again
    import megatron_taipan.evaluation.retrieval as retrieval
    from megatron_taipan.evaluation.text_models import TextModel

    load, count, write = TextModel.load, retrieval.count_ranked_first, found_again.generate
    reader = reading_generate(codec)

    def noted_load(self, options):
        loaded.append(self.path.name)
        return load(self, options)

    monkeypatch.setattr(TextModel, "load", noted_load)
    monkeypatch.setattr(found_again, "generate", lambda *a, **k: (write if len(loaded) == 1 else reader)(*a, **k))
    monkeypatch.setattr(
        retrieval,
        "count_ranked_first",
        lambda network, row: count(network, row) if len(loaded) == 1 else read_pairs(codec, row),
    )
    (tmp_path / "reader").symlink_to(model)
    models = [str(model), str(tmp_path / "reader")]
    options = ["--lengths", "400,800", "--depths", "2", "--samples", "2", "--batch", "1", "--pairs", "3,5"]
    assert main([*models, "--tokenizer", str(tokenizer), *options, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    record = json.loads((tmp_path / "out/retrieval.json").read_text())
    assert len(record["rows"]) == 2 * 2 * (3 * 2 + 2)
    for row in record["rows"]:
        assert row["asked"] == 2 * (row["pairs"] or 1) and row["accuracy"] == row["found"] / row["asked"]
        assert row["beyond training"] == (row["length"] == 800)
        assert row["accuracy"] == (1 if row["model"].endswith("reader") else 0)
    assert "| retrieval" not in said.out and said.out.count("\n") == len(record["rows"]) + 2
    assert "100%" in said.err
    made = {path.name for path in (tmp_path / "out").glob("*.svg")}
    assert made == {
        "retrieval.svg",
        "retrieval-recall.svg",
        *(f"retrieval-{kind}-{n}.svg" for kind in prompts.DEPTH_KINDS for n in ("1-tiny", "2-reader")),
    }
    heat = (tmp_path / "out/retrieval-needle-1-tiny.svg").read_text()
    assert record["about"]["models"] == " ".join(models) and record["about"]["kinds"] == " ".join(retrieval.KINDS)
    for curves in ("retrieval.svg", "retrieval-recall.svg"):  # shares: the axis is from 0 to 1 whatever was found
        drawn = (tmp_path / "out" / curves).read_text()
        assert {f">{share:.1f}<" for share in (0, 0.2, 0.4, 0.6, 0.8, 1)} <= set(re.findall(r">-?[\d.]+<", drawn))
    assert "800*" in heat and "beyond the 600 of training" in heat and ">400<" in heat.replace("400*", "")
    assert "training length 600" in (tmp_path / "out/retrieval.svg").read_text()


def test_a_heat_map_has_every_share_where_its_depth_and_length_cross(tmp_path):
    """By the places of the words in the picture; depths are written downwards from the start of the text."""
    shares = {(depth, length): 0.1 + 0.4 * depth + length / 1e4 for depth in (0.0, 0.5, 1.0) for length in (500, 2000)}
    rows = [
        {"model": "m", "kind": "needle", "length": length, "beyond training": length > 600, "depth": depth,
         "asked": 1, "found": share, "accuracy": share}
        for (depth, length), share in shares.items()
    ]  # fmt: skip
    draw_figures(tmp_path, rows, [TextModel(Path("m"), None, 600)])
    at = {}
    for element in ElementTree.parse(tmp_path / "retrieval-needle-1-m.svg").iter():
        if element.tag.endswith("text"):
            at.setdefault(element.text, (float(element.get("x")), float(element.get("y"))))
    for (depth, length), share in shares.items():
        x, y = at[f"{share:.2g}"]
        row = min(("0%", "50%", "100%"), key=lambda word: abs(at[word][1] - y))
        column = min(("500", "2000*"), key=lambda word: abs(at[word][0] - x))
        assert (row, column) == (f"{depth:.0%}", "500" if length == 500 else "2000*")
    assert at["0%"][1] < at["50%"][1] < at["100%"][1]


def test_the_same_seed_asks_the_same_whatever_else_is_asked(tokenizer, model, monkeypatch):
    import megatron_taipan.evaluation.found_again as found_again

    seen: list[list[list[int]]] = []
    monkeypatch.setattr(
        found_again, "generate", lambda _, prompts, **__: seen[-1].extend(prompts) or [[5] for _ in prompts]
    )
    for arguments in (
        ["--kinds", "needle", "--samples", "2"],
        ["--kinds", "phonebook,needle", "--samples", "3", "--batch", "2"],
        ["--kinds", "needle", "--samples", "2", "--seed", "1"],
    ):
        seen.append([])
        asked = [str(model), "--tokenizer", str(tokenizer), "--lengths", "500", "--depths", "1", *arguments]
        assert main(asked) == 0
    first, more, other = ({tuple(prompt) for prompt in prompts} for prompts in seen)
    assert len(first) == 2 and first < more and not first & other


def test_results_are_kept_where_the_table_cannot_be_printed(tokenizer, model, tmp_path, monkeypatch):
    """As on a full disk with the output, or into a pipe that nobody reads."""

    def cannot(*args):
        raise BrokenPipeError

    monkeypatch.setattr("megatron_taipan.evaluation.retrieval.print", cannot, raising=False)
    asked = [str(model), "--tokenizer", str(tokenizer), "--kinds", "passkey", "--lengths", "300", "--samples", "1"]
    with pytest.raises(BrokenPipeError):
        main([*asked, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/retrieval.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("task", ["retrieval", "qa", "passkey"])
def test_a_gate_that_is_shut_is_warned_of(task, tokenizer, tmp_path, capsys):
    shut = Taipan(small_config("M S", vocab_size=600, gate={"threshold": 50.0}))
    weights = write_weights(tmp_path / "shut", shut)
    arguments = {
        "retrieval": ["--kinds", "needle", "--lengths", "300", "--depths", "1", "--samples", "1"],
        "qa": ["--data", str(SAMPLE), "--samples", "2", "--max-new-tokens", "2"],
        "passkey": ["--lengths", "300", "--depths", "1", "--samples", "1"],
    }
    assert evaluate([task, str(weights), "--tokenizer", str(tokenizer), *arguments[task]]) == 0
    assert "layers.1 selects 0.00% of the tokens, where training asked for 15%" in capsys.readouterr().err


class Cut:
    """A tokenizer of so many characters a token, some of none."""

    def __init__(self, *sizes: int):
        self.sizes = sizes

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[bytes]]:
        parts, at = [], 0
        while at < len(text):
            size = self.sizes[len(parts) % len(self.sizes)]
            parts.append(text[at : at + size].encode())
            at += size
        return list(range(len(parts))), parts


@pytest.mark.parametrize("sizes", [(1,), (3,), (2, 0, 5), (0, 0, 1, 7)])
def test_the_tokens_of_a_value_are_all_that_touch_it(sizes):
    text, spans = "x" * 60, [(first, first + size) for first in (0, 3, 4, 31, 50) for size in (1, 2, 5, 10)]
    ids, parts = Cut(*sizes).encode_with_bytes(text)
    owners = [i for i, part in enumerate(parts) for _ in part]  # of each character
    found = prompts.place_values(Cut(*sizes), text, spans)
    assert found.tokens == ids
    assert [(r[0], r[-1]) for r in found.values] == [(owners[first], owners[last - 1]) for first, last in spans]


def test_many_values_of_a_long_text_are_placed_at_once():
    """A look at every token for each of them would take minutes."""
    values = [(at, at + 5) for at in range(0, 1 << 18, 64)]
    began = time.perf_counter()
    found = prompts.place_values(Cut(4), "x" * (1 << 18), values)
    assert len(found.values) == len(values) and time.perf_counter() - began < 10
