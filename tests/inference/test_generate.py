"""The generation program: text in, text out, one line for what the user got wrong."""

import json

import pytest

from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.data_config import DataConfig, DataSource
from megatron_taipan.errors import UserError
from megatron_taipan.inference.generate import main
from megatron_taipan.inference.generation import generate
from megatron_taipan.inference.text import sample_texts
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.tokenizer.load import load_tokenizer_file
from tests.checkpoint.test_weights import write_weights
from tests.checkpoints.made import lines_of_text, train_sentencepiece
from tests.inference.networks import small_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    model = Taipan(small_config("M S W", vocab_size=600), seed=1).eval()
    return model, write_weights(folder / "weights", model), train_sentencepiece(folder)


def test_greedy_text_is_the_decoded_ids(trained, capsys):
    model, folder, tokenizer = trained
    prompts = ["def ", "import os"]
    arguments = [str(folder), "--tokenizer", str(tokenizer), "--temperature", "0", "--max-new-tokens", "9", "--json"]
    assert main([*arguments, *(word for prompt in prompts for word in ("--prompt", prompt))]) == 0
    codec = load_tokenizer_file(tokenizer)
    wanted = generate(model, [codec.encode(p) for p in prompts], max_new_tokens=9, stop_tokens=codec.end_ids)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["new_tokens"] for answer in answers] == wanted
    assert [answer["prompt"] for answer in answers] == prompts
    assert all(answer["text"].startswith(prompt) for answer, prompt in zip(answers, prompts, strict=True))


def prompts_of(capsys) -> list[str]:
    """The prompts of what was printed with --json."""
    return [json.loads(line)["prompt"] for line in capsys.readouterr().out.strip("\n").split("\n")]


def test_files_are_prompts_as_a_whole_or_line_by_line(trained, tmp_path, capsys):
    _, folder, tokenizer = trained
    (tmp_path / "a.txt").write_text("def one(\x0c):\n\n    return 1\n")
    (tmp_path / "b.txt").write_bytes("# two\u2028of these\r\nimport os".encode())
    arguments = [str(folder), "--tokenizer", str(tokenizer), "--max-new-tokens", "2", "--json", "--prompt", "zero"]
    files = ["--prompt-file", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert main([*arguments, *files]) == 0
    assert prompts_of(capsys) == ["zero", "def one(\x0c):\n\n    return 1", "# two\u2028of these\r\nimport os"]
    assert main([*arguments, *files, "--prompt-lines"]) == 0
    assert prompts_of(capsys) == ["zero", "def one(\x0c):", "    return 1", "# two\u2028of these", "import os"]


def test_a_file_goes_on_as_its_text_does(trained, tmp_path, capsys):
    """Lines within a document are part of its prompt."""
    model, folder, tokenizer = trained
    document = "\n".join(lines_of_text()[:30])
    (tmp_path / "document.py").write_text(f"{document}\n")
    arguments = ["--tokenizer", str(tokenizer), "--temperature", "0", "--max-new-tokens", "5", "--json"]
    assert main([str(folder), *arguments, "--prompt-file", str(tmp_path / "document.py")]) == 0
    codec = load_tokenizer_file(tokenizer)
    (wanted,) = generate(model, [codec.encode(document)], max_new_tokens=5, stop_tokens=codec.end_ids)
    assert json.loads(capsys.readouterr().out)["new_tokens"] == wanted


def test_files_that_are_no_prompts_are_refused(trained, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for name, words in (
        ("empty.txt", "holds nothing to continue"),
        ("latin.txt", "UTF-8"),
        ("none.txt", "No such file"),
    ):
        for lines in ([], ["--prompt-lines"]):
            assert main([str(trained[1]), "--prompt-file", str(tmp_path / name), *lines]) == 2
            error = capsys.readouterr().err
            assert words in error and name in error and error.count("\n") == 1


def test_seeds_repeat(trained, capsys):
    _, folder, tokenizer = trained
    arguments = [str(folder), "--tokenizer", str(tokenizer), "--prompt", "one", "--prompt", "two", "--json"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, "--seed", seed, "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].count("\n") == 2
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to continue"),
        (["--prompt", "x", "--prompt-lines"], "name a file"),
        (["--prompt", "x"], "names no tokenizer"),
        (["--prompt", "x", "--tokenizer", "none.model"], "none.model does not exist"),
        (["--prompt", "x", "--top-p", "2"], r"top_p=2.0 must be in"),
        (["--prompt", "x", "--device", "cuda:99"], "is not there"),
        (["--prompt", "x", "--device", "abacus"], "is unknown"),
        (["--prompt", "x", "--device", "vulkan"], "is unknown"),  # torch has the name, its wheels have no such device
    ],
)
def test_mistakes_are_one_line(trained, capsys, arguments, words):
    assert main([str(trained[1]), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("not a tokenizer")
        with pytest.raises(UserError, match="is not a "):
            load_tokenizer_file(tmp_path / name)


def test_sample_texts_are_the_documents(tmp_path):
    tokenizer = train_sentencepiece(tmp_path)
    codec = load_tokenizer_file(tokenizer)
    documents = lines_of_text()[:40]
    with IndexedWriter(tmp_path / "data", "uint16") as writer:
        for text in documents:
            writer.add_document([*codec.encode(text), *codec.end_ids])
    data = DataConfig(train=[DataSource(prefix=str(tmp_path / "data"))])
    texts = sample_texts(data, tokenizer, count=1000)
    assert [t.strip() for t in texts] == [t.strip() for t in documents]
    assert len(sample_texts(data, tokenizer, count=10)) in range(10, 14)
    twice = DataConfig(train=[DataSource(prefix=str(tmp_path / "data"))] * 2)
    assert len(sample_texts(twice, tokenizer, count=10)) in range(10, 14)  # of all datasets together
