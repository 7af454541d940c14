"""YAML and JSON that mean harm, and names that lead elsewhere."""

import json
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.checksums import read_sums
from checkpoints.foreign.files import weight_files
from data_prep import inputs
from data_prep.recipes import load_recipe
from megatron_taipan.config_errors import ConfigError
from megatron_taipan.config_loading import load_config
from megatron_taipan.errors import UserError
from megatron_taipan.plain_yaml import LONGEST_YAML, MOST_ALIASES, parse_yaml
from megatron_taipan.untrusted import plain_name
from tests.train.toy import toy_tree

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    "laughs": LAUGHS,
    "within itself": "model: &m {gate: *m}",
    "list within itself": "&a [*a]",
    "deep": "[" * 5000,
    "date": "name: 2026-13-45",
    "number": "train: {steps: " + "1" * 5000 + "}",
    "typed": "name: !!timestamp x",
    "object": "name: !!python/object/apply:os.getcwd []",
    "long": "#" * (LONGEST_YAML + 1),
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_yaml_that_means_harm_is_refused_in_one_line_and_at_once(tmp_path, kind, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(BAD_YAML[kind])
    began = time.perf_counter()
    for read in (load_config, lambda path: load_recipe(str(path))):
        with pytest.raises(UserError) as error:
            read(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    tree = toy_tree("x", tmp_path)
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "good.yaml", ["name=" + BAD_YAML[kind].partition(": ")[2].replace("\n", " ") or "x"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 900
    assert time.perf_counter() - began < 20


def test_a_few_aliases_are_fine():
    text = "a: &a [1, 2]\n" + "".join(f"b{n}: *a\n" for n in range(MOST_ALIASES))
    assert parse_yaml(text) == {"a": [1, 2]} | {f"b{n}": [1, 2] for n in range(MOST_ALIASES)}
    with pytest.raises(ValueError, match=f"more than {MOST_ALIASES} aliases"):
        parse_yaml(text + "c: *a\n")


@given(st.text(max_size=60))
def test_any_text_is_read_as_the_safe_loader_does_or_refused(text):
    try:
        want = yaml.safe_load(text)
    except Exception:  # whatever it raises is a ValueError here
        with pytest.raises(ValueError):
            parse_yaml(text)
        return
    try:
        got = parse_yaml(text)
    except ValueError as error:
        assert "alias" in str(error)
    else:
        assert repr(got) == repr(want)


@given(st.text(max_size=8))
def test_a_plain_name_leads_to_a_file_of_the_folder(name):
    whole = name.encode("utf-8", "replace").decode() == name
    assert plain_name(name) == (
        whole and name == Path(name).name != ".." and not set("\\\0") & set(name) and name != ""
    )
    assert not plain_name(300 * "x" + name)
    if plain_name(name):
        assert (Path("/folder") / name).parent == Path("/folder")


OUTSIDE = ["../secret", "/secret", "..", "a/../../secret", 7, None]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_saved_dataset_that_names_other_places(tmp_path, name):
    home = tmp_path / "home"
    home.mkdir()
    (home / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match="which is not a name of a file beside it"):
        inputs.expand([str(home)])


@pytest.mark.parametrize("name", [*OUTSIDE, ["a"], {}])
def test_an_index_of_weights_that_names_other_places(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="which is not the name of a file beside it"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/secret", "..", ".", "a/b"])
def test_checksums_of_other_places(tmp_path, name):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(UserError, match="line 1 is not a SHA-256 and a file name"):
        read_sums(tmp_path)
