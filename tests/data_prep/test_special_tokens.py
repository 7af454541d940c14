"""Which tokens begin and end a document: from made tokenizers shaped as Qwen's, Gemma's and GPT-2's, in folders, alone,
on a hub on this machine and in its cache."""

import json
import os
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from data_prep import cli
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.tokenizer.load import load_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = ["a", "b", "<s>", "</s>"]  # ids 0 to 3, the latter two ordinary pieces


def make(folder, special, plain=(), **configs):
    """A tokenizer.json of WORDS, `plain` added tokens and `special` ones, with configurations beside it."""
    made = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_tokens(list(plain))
    made.add_special_tokens(list(special))
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def tokenize(tmp_path, tokenizer, *args):
    (tmp_path / "in.jsonl").write_text('{"text": "a b"}\n')
    common = ("tokenize", "--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--output", tmp_path / "o")
    return cli.main([*map(str, common), "--overwrite", "--workers", "1", *args])


def ids(prefix):
    return IndexedReader(prefix).document(0).tolist()


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 4 to 6
GEMMA = ("<pad>", "<eos>", "<bos>", "<end_of_turn>")  # ids 4 to 7


def test_null_in_the_configuration_means_none(tmp_path, capsys):
    folder = make(tmp_path / "t", QWEN, tokenizer_config={"bos_token": None, "eos_token": "<|im_end|>"})
    assert tokenize(tmp_path, folder, "--prepend-bos") == 2
    error = capsys.readouterr().err
    assert "--prepend-bos: tokenizer_config.json says null" in error and "--bos-token" in error
    assert not list(tmp_path.glob("o.*"))
    assert tokenize(tmp_path, folder, "--append-eod") == 0
    assert (
        "begins with nothing added and ends with '<|im_end|>', id 6 (tokenizer_config.json)" in capsys.readouterr().out
    )
    assert ids(tmp_path / "o") == [0, 1, 6]
    said = json.loads((tmp_path / "o.json").read_text())
    assert said["options"]["eod"] == 6 and said["added"]["bos"] is None
    assert said["added"]["eod"] == {"id": 6, "token": "<|im_end|>", "said": "tokenizer_config.json"}


def test_ordinary_pieces_are_no_special_tokens(tmp_path, capsys):
    """Gemma's file alone: `</s>` is a tag of HTML there, and an added token besides."""
    folder = make(tmp_path / "t", GEMMA, plain=["</s>"])
    assert tokenize(tmp_path, folder / "tokenizer.json", "--append-eod", "--prepend-bos") == 0
    assert ids(tmp_path / "o") == [6, 0, 1, 5]
    assert "'<bos>', id 6 (a special token of a usual name)" in capsys.readouterr().out
    plain = make(tmp_path / "p", ())
    for flag in ("--append-eod", "--prepend-bos"):
        assert tokenize(tmp_path, plain, flag) == 2
        assert "no special token has a usual name" in capsys.readouterr().err
    named = make(tmp_path / "n", (), tokenizer_config={"eos_token": "</s>"})
    assert tokenize(tmp_path, named, "--append-eod") == 2
    assert "'</s>', id 3, an ordinary token" in capsys.readouterr().err
    assert tokenize(tmp_path, named, "--append-eod", "--eod-token", "</s>") == 0  # who insists
    assert ids(tmp_path / "o") == [0, 1, 3]


def test_two_candidates_are_an_error_that_names_them(tmp_path, capsys):
    alone = make(tmp_path / "t", QWEN)
    assert tokenize(tmp_path, alone, "--append-eod") == 2
    error = capsys.readouterr().err
    assert "'<|endoftext|>' (id 4) and '<|im_end|>' (id 6)" in error and "--eod-token" in error
    assert tokenize(tmp_path, alone, "--append-eod", "--eod-token", "<|endoftext|>") == 0
    assert ids(tmp_path / "o") == [0, 1, 4]
    configs = {"tokenizer_config": {"eos_token": "<|im_end|>"}, "special_tokens_map": {"eos_token": "<|endoftext|>"}}
    assert tokenize(tmp_path, make(tmp_path / "d", QWEN, **configs), "--append-eod") == 2
    error = capsys.readouterr().err
    assert "tokenizer_config.json names '<|im_end|>'; special_tokens_map.json names '<|endoftext|>'" in error


@pytest.mark.parametrize(
    ("configs", "eod", "bos"),
    [
        ({}, None, None),
        ({"tokenizer_config": {}}, None, None),
        ({"special_tokens_map": {"eos_token": {"content": "<|endoftext|>"}}}, 4, None),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}, "special_tokens_map": {}}, 6, None),
        ({"generation_config": {"eos_token_id": 6, "bos_token_id": 4}}, 6, 4),
        ({"generation_config": {"eos_token_id": [6, 4]}}, None, None),
        ({"generation_config": {"eos_token_id": 6}, "tokenizer_config": {"eos_token": "<|endoftext|>"}}, 4, None),
        ({"tokenizer_config": {"eos_token": "<|elsewhere|>"}}, None, None),
    ],
)
def test_what_the_configurations_say(tmp_path, configs, eod, bos):
    found = load_tokenizer(str(make(tmp_path / "t", QWEN, **configs)))
    assert (found.eod, found.bos) == (eod, bos)


def test_a_broken_configuration_is_an_error(tmp_path, capsys):
    folder = make(tmp_path / "t", QWEN)
    (folder / "tokenizer_config.json").write_text('{"eos_token": ')
    assert tokenize(tmp_path, folder, "--append-eod") == 2
    assert "tokenizer_config.json cannot be read" in capsys.readouterr().err


def test_a_sentencepiece_model_and_the_configuration_beside_it(tmp_path, model, capsys):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/tokenizer.model").write_bytes(Path(model).read_bytes())
    assert load_tokenizer(str(tmp_path / "t")).eod == 2
    config = tmp_path / "t/tokenizer_config.json"
    config.write_text('{"bos_token": null, "eos_token": "<s>"}')
    assert tokenize(tmp_path, tmp_path / "t", "--append-eod") == 2
    assert "tokenizer_config.json names '<s>'; the tokenizer names '</s>'" in capsys.readouterr().err
    assert tokenize(tmp_path, tmp_path / "t", "--prepend-bos") == 2
    config.write_text('{"eos_token": "</s>"}')
    found = load_tokenizer(str(tmp_path / "t"))
    assert (found.bos, found.eod) == (1, 2)


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub: files of the repository `some/model` at one commit, which lie in a folder."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder, *args):
        self.folder = folder
        super().__init__(*args)

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        file = self.folder / rest.partition("/")[2]
        there = repository == "some/model" and file.is_file()
        body = file.read_bytes() if there else b""
        self.send_response(200 if there else 404)
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}-{file.name}"')
        if not there:
            self.send_header("X-Error-Code", "EntryNotFound" if repository == "some/model" else "RepoNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """(address, folder) of a hub with one repository, whose files are those of the folder."""
    (tmp_path / "repository").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, tmp_path / "repository"))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "repository"
    server.shutdown()
    server.server_close()


def from_hub(tmp_path, address, cache, *args, **environment):
    (tmp_path / "in.jsonl").write_text('{"text": "a b"}\n')
    command = [sys.executable, "-m", "data_prep", "tokenize", "--input", str(tmp_path / "in.jsonl"), "--workers", "1"]
    command += ["--tokenizer", "some/model", "--output", str(tmp_path / "o"), "--overwrite", *args]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / cache), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True)


def test_a_hub_name_brings_its_configuration(tmp_path, hub):
    address, repository = hub
    make(repository, QWEN, tokenizer_config={"bos_token": None, "eos_token": "<|im_end|>"})
    done = from_hub(tmp_path, address, "cache", "--append-eod")
    assert done.returncode == 0, done.stderr
    assert "'<|im_end|>', id 6 (tokenizer_config.json)" in done.stdout and ids(tmp_path / "o") == [0, 1, 6]
    done = from_hub(tmp_path, address, "cache", "--append-eod", "--prepend-bos", HF_HUB_OFFLINE="1")  # from the cache
    assert done.returncode == 2 and "says null" in done.stderr
    snapshot = tmp_path / f"cache/hub/models--some--model/snapshots/{Hub.COMMIT}"
    (snapshot / "tokenizer_config.json").unlink()  # as an earlier release left the cache
    done = from_hub(tmp_path, address, "cache", "--append-eod", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "the hub does not give tokenizer_config.json" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_repository_without_configuration_or_tokenizer(tmp_path, hub):
    address, repository = hub
    make(repository, GEMMA, plain=["</s>"])
    done = from_hub(tmp_path, address, "cache", "--append-eod")
    assert done.returncode == 0 and ids(tmp_path / "o") == [0, 1, 5], done.stderr
    (repository / "tokenizer.json").rename(repository / "vocab.json")
    done = from_hub(tmp_path, address, "empty", "--append-eod")
    assert done.returncode == 2 and "holds none of tokenizer.json" in done.stderr and done.stderr.count("\n") == 1


def test_other_forms_of_tokenizers_say_what_is_expected(tmp_path, gpt2_like, speeches, capsys):
    from transformers import GPT2TokenizerFast

    folder = tmp_path / "parts"
    folder.mkdir()
    tokenizers.Tokenizer.from_file(gpt2_like).model.save(str(folder))
    for name in (folder, folder / "vocab.json"):
        assert tokenize(tmp_path, name) == 2
        error = capsys.readouterr().err
        assert f"from_pretrained('{folder}').save_pretrained('{folder}')" in error and error.count("\n") == 1
    GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)  # what the message asks for
    ours, theirs = load_tokenizer(str(folder)), load_tokenizer(gpt2_like)
    assert (
        ours.encode_batch(speeches[:3])[0].tolist() == theirs.encode_batch(speeches[:3])[0].tolist() and ours.eod == 0
    )
    mistral = tmp_path / "mistral"
    mistral.mkdir()
    (mistral / "tekken.json").write_text('{"config": {}, "vocab": [{"rank": 0, "token_bytes": "AA=="}]}')
    for name in (mistral, mistral / "tekken.json"):
        assert tokenize(tmp_path, name) == 2
        error = capsys.readouterr().err
        assert "mistral_common's form, is not read: give the tokenizer.json" in error and error.count("\n") == 1
    (tmp_path / "list.json").write_text("[]")
    assert tokenize(tmp_path, tmp_path / "list.json") == 2 and "give a tokenizer.json" in capsys.readouterr().err
