"""A checkpoint is on the disk before it has its name, its manifest last, and the name is durable too."""

import json

import pytest
import torch

from megatron_taipan.checkpoint.files import TEMPORARY, write_tensors, write_text
from megatron_taipan.checkpoint.folder import (
    CONFIG,
    FULL,
    LATEST,
    MANIFEST,
    METADATA,
    WEIGHTS,
    complete_checkpoint,
    folder_name,
    incomplete,
)
from megatron_taipan.checkpoint.verification import damage
from tests.durable import watched_renames


@pytest.mark.parametrize("kind", [FULL, WEIGHTS])
def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, kind):
    final = tmp_path / folder_name(3, kind)
    temporary = tmp_path / (final.name + TEMPORARY)
    (temporary / "state").mkdir(parents=True)
    file = "state/rank_00000.safetensors"
    texts = {METADATA: json.dumps({"format": 1}), CONFIG: "a: 1"}
    with watched_renames(monkeypatch) as seen:
        written = {file: write_tensors(temporary / file, {"a": torch.arange(3.0)})}
        complete_checkpoint(temporary, final, texts, written)
    assert seen.names == [METADATA, CONFIG, MANIFEST, final.name, *([LATEST] if kind == FULL else [])]
    assert not seen.folders
    assert incomplete(final) is None and damage(final) is None


def test_a_small_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    write_text(tmp_path / "latest", "old")
    with watched_renames(monkeypatch) as seen:
        write_text(tmp_path / "latest", "new")
    assert seen.names == ["latest"] and not seen.folders and (tmp_path / "latest").read_text() == "new"
