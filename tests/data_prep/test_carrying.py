"""What a manifest says of the tokenizer goes along through merge, split and dedup, and is compared on the way."""

import json
from pathlib import Path

import pytest
import tokenizers

from data_prep import cli
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError


def run(*args):
    return cli.main([str(arg) for arg in args])


@pytest.fixture
def corpora(tmp_path, gpt2_like):
    """Pairs `one` and `two` of one tokenizer, in two runs, and `other` of another one of the same size; all uint16."""
    swapped = json.loads(Path(gpt2_like).read_text())
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "other_tokenizer.json").write_text(json.dumps(swapped))
    assert tokenizers.Tokenizer.from_file(gpt2_like).encode("a b").ids != (
        tokenizers.Tokenizer.from_file(str(tmp_path / "other_tokenizer.json")).encode("a b").ids
    )
    made = {}
    for name, tokenizer in (("one", gpt2_like), ("two", gpt2_like), ("other", tmp_path / "other_tokenizer.json")):
        lines = [json.dumps({"text": f"a text of {name}, number {i // 2}"}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        made[name] = tmp_path / f"pair_{name}"
        args = ("--tokenizer", tokenizer, "--output", made[name], "--append-eod", "--workers", 1)
        assert run("tokenize", "--input", tmp_path / f"{name}.jsonl", *args) == 0
    return made


def test_pairs_of_two_tokenizers_are_not_merged(corpora, tmp_path, capsys):
    assert run("merge", corpora["one"], corpora["other"], "--output", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert "was made with the tokenizer" in error and "other_tokenizer.json" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("o.*"))
    (tmp_path / "pair_other.json").unlink()  # as Megatron's own: taken, and the result is of unknown origin
    assert run("merge", corpora["one"], corpora["other"], "--output", tmp_path / "o") == 0
    assert not (tmp_path / "o.json").exists()


def test_the_tokenizer_goes_along(corpora, tmp_path, gpt2_like, capsys):
    """Through all three in turn; the result cannot be mixed either, and `verify` knows the ends of documents."""
    assert run("merge", corpora["one"], corpora["two"], "--output", tmp_path / "all") == 0
    assert run("dedup", tmp_path / "all", "--output", tmp_path / "once") == 0
    assert run("split", tmp_path / "once", "--output", tmp_path / "s", "--shard-tokens", 200) == 0
    assert run("split", tmp_path / "once", "--output", tmp_path / "s", "--valid-fraction", 0.2) == 0
    source = json.loads(Path(f"{corpora['one']}.json").read_text())
    for name in ("all", "once", "s-00000", "s-00001", "s-train", "s-valid"):
        said, reader = json.loads((tmp_path / f"{name}.json").read_text()), IndexedReader(tmp_path / name)
        assert said["tokenizer"] == source["tokenizer"] and said["added"] == source["added"]
        assert said["options"]["eod"] == 0 and said["documents"] == reader.n_documents
        assert run("verify", tmp_path / name, "--tokenizer", gpt2_like) == 0
        out = capsys.readouterr().out
        assert "is whole: structure, ids, counts (no checksums in its manifest), ends of documents" in out
        assert run("stats", tmp_path / name) == 0
        assert run("merge", tmp_path / name, corpora["other"], "--output", tmp_path / "o") == 2
        with pytest.raises(UserError, match="another token in each"):
            build_dataset(DataConfig(train=[str(tmp_path / name), str(corpora["other"])], seq_len=8), "train", 5000)
        for command in ("inspect", "stats", "verify"):
            assert run(command, tmp_path / name, "--tokenizer", tmp_path / "other_tokenizer.json") == 2
            assert "is not the tokenizer that" in capsys.readouterr().err


def test_a_lost_mask_is_missed_after_dedup_too(tmp_path, gpt2_like, capsys):
    (tmp_path / "in.jsonl").write_text('{"q": "why", "a": "so"}\n{"q": "who", "a": "me"}\n')
    template = ("--template", "{q}{% generation %} {a}{% endgeneration %}")
    args = ("--tokenizer", gpt2_like, "--output", tmp_path / "x", *template)
    assert run("tokenize", "--input", tmp_path / "in.jsonl", *args) == 0
    assert run("dedup", tmp_path / "x", "--output", tmp_path / "y") == 0
    assert run("verify", tmp_path / "y") == 0 and "loss mask" in capsys.readouterr().out
    for ending in (".bin", ".idx"):
        (tmp_path / f"y_loss_mask{ending}").unlink()
    assert run("verify", tmp_path / "y") == 2 and "its manifest names it" in capsys.readouterr().err


def test_a_file_that_only_has_the_name_of_a_manifest_stays(corpora, tmp_path, capsys):
    (tmp_path / "raw.json").write_text('{"text": "the raw corpus"}')
    assert run("dedup", corpora["one"], "--output", tmp_path / "raw") == 0
    assert "raw.json describes something else" in capsys.readouterr().out
    assert (tmp_path / "raw.json").read_text() == '{"text": "the raw corpus"}'


def test_pairs_with_other_ends_say_nothing_of_them(tmp_path, gpt2_like, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "a b"}\n')
    for name, more in (("with", ["--append-eod"]), ("without", [])):
        args = ("--tokenizer", gpt2_like, "--output", tmp_path / name, *more)
        assert run("tokenize", "--input", tmp_path / "in.jsonl", *args) == 0
    assert run("merge", tmp_path / "with", tmp_path / "without", "--output", tmp_path / "both") == 0
    said = json.loads((tmp_path / "both.json").read_text())
    assert said["options"]["eod"] is None and "added" not in said
    assert run("verify", tmp_path / "both") == 0
