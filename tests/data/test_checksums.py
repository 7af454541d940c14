"""data.verify: every byte against the manifest."""

import json
import os
from contextlib import contextmanager

import numpy as np
import pytest

from data_prep import cli
from megatron_taipan.data import checksums
from megatron_taipan.data.checksums import Verification
from megatron_taipan.data.indexed import IndexedReader, IndexedWriter
from megatron_taipan.data.sources import open_reader
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenized corpus with marks, in several shards."""
    folder = tmp_path_factory.mktemp("made")
    source, tokenizer = folder / "in.jsonl", folder / "t.model"
    source.write_text("".join(json.dumps({"q": f"question {i}", "a": f"{i} " * 100}) + "\n" for i in range(600)))
    template = "{q}:{% generation %} {a}{% endgeneration %}"
    train = ("train-tokenizer", "--input", source, "--template", "{q} {a}", "--output", tokenizer, "--vocab-size", 360)
    assert cli.main([str(arg) for arg in train]) == 0
    args = ("tokenize", "--input", source, "--tokenizer", tokenizer, "--template", template, "--output", folder / "o")
    assert cli.main([str(arg) for arg in (*args, "--shard-tokens", 80_000)]) == 0
    return folder / "o"


def verify(prefix, process=0, processes=1, loss_mask="auto"):
    train = {"prefix": str(prefix), "loss_mask": loss_mask}
    turn = Verification(DataConfig(train=train), process, processes)
    turns = 0
    while turn.unfinished:
        turn.go_on()
        turns += 1
    return turn, turns


@contextmanager
def flipped(path, at):
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    yield
    path.write_bytes(whole)


def test_a_token_that_the_fingerprint_does_not_cover_is_found(made):
    whole, _ = verify(made)
    shards = len(open_reader(str(made)).pairs)
    assert shards > 1 and whole.files == 4 * shards
    assert whole.size == sum(os.path.getsize(path) for path in made.parent.glob("o-*"))
    assert f"every byte of {4 * shards} files" in whole.report()
    for name in ("o-00000.bin", "o-00001.bin", "o-00000_loss_mask.bin"):
        path = made.with_name(name)
        pair = IndexedReader(str(path)[:-4])
        assert pair.bin_bytes > 16 * 4600
        before = pair.fingerprint, open_reader(str(made)).fingerprint
        with flipped(path, 4300):  # between the first two blocks that the fingerprint covers, of this pair and of all
            assert (IndexedReader(pair.prefix).fingerprint, open_reader(str(made)).fingerprint) == before
            with pytest.raises(UserError, match=f"{name} has checksum .*o.json says .*bytes of it changed"):
                verify(made)
            if "mask" in name:
                verify(made, loss_mask="ignore")


def test_every_file_is_read_by_one_process(made, monkeypatch):
    for processes in (1, 2, 3, 50):
        for path in sorted(made.parent.glob("o-*")):
            found = 0
            with flipped(path, 50):
                for process in range(processes):
                    try:
                        verify(made, process, processes)
                    except UserError as error:
                        found += path.name in str(error)
            assert found == 1
    monkeypatch.setattr(checksums, "BYTES_PER_TURN", 1 << 14)
    monkeypatch.setattr(checksums, "BLOCK", 1 << 13)
    turn, turns = verify(made)
    assert turn.size / (3 << 13) <= turns <= turn.size / (1 << 14) + 1


def test_what_has_no_checksums_is_refused_and_not_passed(made, tmp_path):
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(made), "--output", str(merged)]) == 0
    with pytest.raises(UserError, match="merged.bin has no checksum: only what .*merged.json.*data.verify=false"):
        verify(merged)
    with IndexedWriter(tmp_path / "plain", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    (tmp_path / "plain.json").write_text("[1]")
    with pytest.raises(UserError, match="plain.bin has no checksum"):
        verify(tmp_path / "plain")


def test_data_for_validation_is_checked_too(made, tmp_path):
    for path in made.parent.glob("o*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = DataConfig(train=str(made), valid=str(tmp_path / "o"))
    assert Verification(data).files == 2 * verify(made)[0].files
    with (
        flipped(tmp_path / "o-00000.bin", 4300),
        pytest.raises(UserError, match=f"{tmp_path}/o-00000.bin has checksum"),
    ):
        Verification(data).go_on()
