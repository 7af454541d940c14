"""Ids of two tokenizers do not meet in one run, where the manifests tell; without manifests all is taken."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.data.made_with import added_ids, tokenizer_of
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError


def pair(path: Path, tokenizer: Path | None, eod: int | None = None, manifest: str | None = None) -> str:
    """40 documents of 9 tokens; `manifest`: its name, without .json, if it is not the pair's."""
    with IndexedWriter(path, np.uint16) as writer:
        for i in range(40):
            writer.add_document(range(i, i + 9))
    if tokenizer:
        digest = sha256(tokenizer.read_bytes()).hexdigest()
        content = {
            "shards": [{"prefix": path.name}],
            "tokenizer": {"name": str(tokenizer), "sha256": digest},
            "options": {"bos": None, "eod": eod},
        }
        path.with_name(f"{manifest or path.name}.json").write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def made(tmp_path):
    """Tokenizer files a and b; pairs of a, of b (a shard), and of nobody knows."""
    for name in "ab":
        (tmp_path / f"{name}.model").write_text(name)
    return {
        "a": pair(tmp_path / "of_a", tmp_path / "a.model", eod=3),
        "b": pair(tmp_path / "of_b-00000", tmp_path / "b.model", eod=4, manifest="of_b"),
        "unknown": pair(tmp_path / "unknown", None),
    }


def build(split="train", **options):
    return build_dataset(DataConfig(**{"seq_len": 8, "valid_fraction": 0.5, **options}), split, 100)


def test_a_blend_of_two_tokenizers_is_refused(made, tmp_path):
    for options in ({"train": [made["a"], made["b"]]}, {"train": made["unknown"], "valid": [made["a"], made["b"]]}):
        for split in ("train", "valid"):
            with pytest.raises(UserError, match=r"of_b-00000 was made with .*b\.model .* and .*of_a with .*a\.model"):
                build(split, **options)
    with pytest.raises(UserError, match="of_b-00000 was made with"):
        build(train=made["a"], valid=made["b"])
    assert len(build(train=[made["a"], made["unknown"]])) > 0
    (tmp_path / "of_b.json").unlink()
    assert len(build(train=[made["a"], made["b"]])) > 0


def test_data_tokenizer_is_that_of_the_data(made, tmp_path):
    assert len(build(train=made["a"], tokenizer=str(tmp_path / "a.model"))) > 0
    with pytest.raises(UserError, match=r"data.tokenizer: .*b\.model .* is not the tokenizer that .*of_a was made"):
        build(train=made["a"], tokenizer=str(tmp_path / "b.model"))
    for train, tokenizer in ((made["unknown"], tmp_path / "b.model"), (made["a"], tmp_path / "gone.model")):
        assert len(build(train=train, tokenizer=str(tokenizer))) > 0


def test_a_tokenizer_that_is_no_file_cannot_be_compared_with_one(made, tmp_path):
    manifest = tmp_path / "of_a.json"
    manifest.write_text(manifest.read_text().replace(str(tmp_path / "a.model"), "tiktoken:gpt2"))
    assert len(build(train=made["a"], tokenizer=str(tmp_path / "b.model"))) > 0


def test_files_that_are_no_manifest_say_nothing(made, tmp_path):
    for content in (
        "[]",
        "{",
        '{"shards": 3}',
        '{"shards": [1]}',
        '{"shards": [{"prefix": "unknown"}], "tokenizer": 1}',
    ):
        (tmp_path / "unknown.json").write_text(content)
        assert tokenizer_of(made["unknown"]) is None and added_ids([made["unknown"]]) == {}
        assert len(build(train=[made["unknown"], made["a"]])) > 0


def test_added_ids_are_those_of_all(made):
    assert added_ids([made["a"], made["unknown"]]) == {"eod": 3}
    assert added_ids([made["a"], made["b"]]) == added_ids([made["unknown"]]) == {}
