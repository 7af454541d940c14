"""An export is on the disk before it has its name."""

from checkpoints.checksums import changed_files, write_sums
from checkpoints.whole_folder import whole_folder
from tests.durable import watched_renames


def test_every_file_of_an_export_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    with watched_renames(monkeypatch) as seen, whole_folder(tmp_path / "hf") as work:
        (work / "config.json").write_text("{}")
        (work / "README.md").write_text("a card, which is in no list of checksums")
        (work / "model.safetensors").write_bytes(bytes(9000))
        write_sums(work)
    assert seen.names == ["hf"] and changed_files(tmp_path / "hf") == []
