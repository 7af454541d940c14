"""An export, or an import, is on the disk before it has its name."""

from checkpoints.checksums import changed_files, write_sums
from checkpoints.map_weights import Source, map_weights
from checkpoints.whole_folder import whole_folder
from tests.checkpoints.made import memory_state
from tests.durable import watched_renames


def test_every_file_of_an_export_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    with watched_renames(monkeypatch) as seen, whole_folder(tmp_path / "hf") as work:
        (work / "config.json").write_text("{}")
        (work / "README.md").write_text("a card, which is in no list of checksums")
        (work / "model.safetensors").write_bytes(bytes(9000))
        write_sums(work)
    assert seen.names == ["hf"] and not seen.folders and changed_files(tmp_path / "hf") == []


def test_so_is_every_file_of_an_import(tmp_path, monkeypatch):
    state = memory_state("MS")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
    with watched_renames(monkeypatch) as seen:
        map_weights(state.config.model, Source("MS", shapes, state.load), tmp_path / "weights", 0)
    assert seen.names == ["weights"] and not seen.folders and changed_files(tmp_path / "weights") == []
