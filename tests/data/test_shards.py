"""Several pairs as one source: the same as the one pair that `data_prep merge` makes of them."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli
from megatron_taipan.data.indexed import IndexedReader, IndexedWriter
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.data.shards import Shards
from megatron_taipan.data.sources import find_pairs, open_reader
from megatron_taipan.data_config import DataConfig, DataSource
from megatron_taipan.errors import UserError

shard_contents = st.lists(st.lists(st.integers(0, 9), max_size=20), min_size=2, max_size=6)


def write(prefix, lengths, dtype=np.uint16, at=0):
    with IndexedWriter(prefix, dtype) as writer:
        for length in lengths:
            writer.add_document([*range(at, at + length)])
            at += length
    return at


def sharded(folder, shards, mask=False):
    """Shards o-00000, ..., and `merged`, the pair that Megatron's writer would make of all their documents."""
    at = 0
    for number, lengths in enumerate(shards):
        at = write(folder / f"o-{number:05d}", lengths, at=at)
    write(folder / "merged", [length for lengths in shards for length in lengths])
    if mask:
        rng = np.random.default_rng(0)
        names = [*(f"o-{number:05d}" for number in range(len(shards))), "merged"]
        bits = [rng.integers(0, 2, sum(lengths)).astype(np.uint8) for lengths in shards]
        for name, lengths, mine in zip(names, [*shards, sum(shards, [])], [*bits, np.concatenate(bits)], strict=True):
            with IndexedWriter(folder / f"{name}_loss_mask", np.uint8) as writer:
                for part in np.split(mine, np.cumsum(lengths)[:-1]) if lengths else []:
                    writer.add_document(part)
    return str(folder / "o"), str(folder / "merged")


@settings(max_examples=60, deadline=None)
@given(shards=shard_contents)
def test_shards_read_like_one_pair(tmp_path_factory, shards):
    name, merged = sharded(tmp_path_factory.mktemp("s"), shards)
    ours, theirs = pickle.loads(pickle.dumps(open_reader(name))), IndexedReader(merged)
    assert isinstance(ours, Shards) and len(ours.pairs) == len(shards)
    n = theirs.n_documents
    assert (ours.n_documents, ours.n_tokens, ours.fingerprint) == (n, theirs.n_tokens, theirs.fingerprint)
    everything = np.arange(n + 1)
    assert ours.starts(everything).tolist() == theirs.starts(everything).tolist() == [ours.start(d) for d in everything]
    assert [ours.find(p) for p in range(ours.n_tokens)] == [theirs.find(p) for p in range(ours.n_tokens)]
    for document in range(n):
        assert ours.document(document).tolist() == theirs.document(document).tolist()
    for position in range(ours.n_tokens):
        prefix, token, document = ours.where(position)
        assert IndexedReader(prefix).document(document)[token - IndexedReader(prefix).start(document)] == position
    a, b = np.sort(np.random.default_rng(1).integers(0, ours.n_tokens + 1, (2, 20)), 0)
    for mine, wanted in zip(ours.boundaries(a, b), theirs.boundaries(a, b), strict=True):
        assert mine.tolist() == wanted.tolist()


@pytest.mark.parametrize("options", [{}, {"one_document": True}, {"mask": True}])
def test_samples_of_shards_are_those_of_the_merged_pair(tmp_path, options):
    mask = options.pop("mask", False)
    lengths = np.random.default_rng(3).integers(0, 60, 120).tolist()
    name, merged = sharded(tmp_path, [lengths[:7], [], lengths[7:80], lengths[80:]], mask)
    for split in ("train", "valid"):
        made = [
            build_dataset(DataConfig(train=source, seq_len=20, valid_fraction=0.2, **options), split, 10_000)
            for source in (name, f"{name}-*", merged)
        ]
        assert len({data.fingerprint for data in made}) == 1
        batches = [data.batch([*range(2 * len(data))]) for data in made]
        for key, wanted in batches[-1].items():
            assert all((batch[key] == wanted).all() for batch in batches)


def test_commands_take_shards_as_one(tmp_path, capsys):
    lengths = np.random.default_rng(3).integers(0, 60, 50).tolist()
    name, merged = sharded(tmp_path, [lengths[:7], [], lengths[7:30], lengths[30:]], mask=True)

    def said(*args):
        assert cli.main([str(arg) for arg in args]) == 0
        return capsys.readouterr().out

    for command in ("stats", "inspect"):
        for source in (name, f"{name}-*"):
            assert said(command, source).replace(source, merged) == said(command, merged)
    assert "4 pairs" in said("merge", name, "--output", tmp_path / "again")
    made = {"again": "merged"}
    for command in (("dedup",), ("split", "--shard-tokens", 200), ("split", "--valid-fraction", 0.3)):
        for source, target in ((name, "x"), (merged, "y")):
            said(*command, source, "--output", tmp_path / target)
    made |= {path.name[:-4]: "y" + path.name[1:-4] for path in tmp_path.glob("x*.idx")}
    assert len(made) > 10
    for mine, wanted in made.items():
        for ending in (".bin", ".idx", "_loss_mask.bin", "_loss_mask.idx"):
            if not mine.endswith("_loss_mask"):
                assert (tmp_path / (mine + ending)).read_bytes() == (tmp_path / (wanted + ending)).read_bytes()
    assert said("verify", name).count("documents") == 4
    assert cli.main(["dedup", name, "--output", f"{name}-00002", "--overwrite"]) == 2


def test_shards_that_do_not_belong_together_are_one_line(tmp_path):
    name, _ = sharded(tmp_path, [[5], [6], [7]])
    write(tmp_path / "o-00003_loss_mask", [1])
    assert find_pairs(name) == find_pairs(f"{name}-0*") == [f"{name}-0000{k}" for k in range(3)]
    (tmp_path / "o.json").write_text(json.dumps({"shards": [{"prefix": f"o-0000{k}"} for k in range(2)]}))
    with pytest.raises(UserError, match=r"o-00002 is beside the 2 shards that .*o.json names"):
        find_pairs(name)
    (tmp_path / "o.json").write_text(json.dumps({"shards": [{"prefix": f"o-0000{k}"} for k in range(4)]}))
    with pytest.raises(UserError, match=r"o-00003.idx does not exist, though its manifest names 4"):
        find_pairs(name)
    (tmp_path / "o.json").unlink()
    os.rename(tmp_path / "o-00001.idx", tmp_path / "away")
    with pytest.raises(UserError, match=r"o-00001.idx does not exist"):
        find_pairs(name)
    write(tmp_path / "o-00001", [3], np.int32)
    with pytest.raises(UserError, match="o-00001 holds int32 and .*o-00000 uint16"):
        open_reader(name)
    with pytest.raises(UserError, match="matches no"):
        open_reader(str(tmp_path / "z*"))
    with pytest.raises(UserError, match="z.idx does not exist"):
        open_reader(str(tmp_path / "z"))
    write(tmp_path / "o", [4])  # a pair of that name comes first, as ever
    assert find_pairs(name) == [name]


def test_a_shard_without_its_mask_is_one_line(tmp_path):
    name, _ = sharded(tmp_path, [[50], [60], [70]], mask=True)
    for ending in (".bin", ".idx"):
        (tmp_path / f"o-00001_loss_mask{ending}").unlink()
    with pytest.raises(UserError, match="o-00001 has no loss mask and .*o-00000_loss_mask is beside"):
        build_dataset(DataConfig(train=name, seq_len=9, valid_fraction=0), "train", 999)


def test_a_replaced_shard_takes_the_manifest_with_it(tmp_path):
    """Or `verify` would call it damaged."""
    name, merged = sharded(tmp_path, [[5], [6]])
    (tmp_path / "o.json").write_text(
        json.dumps(
            {
                "format": "data_prep manifest 1",
                "shards": [{"prefix": "o-00000"}, {"prefix": "o-00001"}],
                "documents": 2,
                "tokens": 11,
                "tokenizer": {},
                "options": {},
            }
        )
    )
    assert cli.main(["merge", merged, "--output", f"{name}-00001", "--overwrite"]) == 0
    assert not (tmp_path / "o.json").exists()


def test_sizes_as_weights_go_through_all_sources_equally_often(tmp_path):
    """The shards of one output, listed one by one: 0.76, 0.76 and 2.68 epochs with equal weights."""
    name, _ = sharded(tmp_path, [[100] * 35, [100] * 35, [100] * 10])
    paths = [f"{name}-0000{k}" for k in range(3)]

    def epochs(train):
        data = DataConfig(train=train, seq_len=10, valid_fraction=0)
        made = build_dataset(data, "train", 10_000)
        return [*made.epochs(800).values()], made.describe(data.train, 800)

    shares, said = epochs(paths)
    assert np.allclose(shares, [0.762, 0.762, 2.67], rtol=0.01)
    assert "3 sources with equal weights, since none is given (weight: tokens" in said
    assert f"{paths[2]} 33.25 %, 2.66 epochs" in said or f"{paths[2]} 33.38 %, 2.67 epochs" in said
    for train in ({"prefix": paths, "weight": "tokens"}, [{"prefix": path, "weight": "tokens"} for path in paths]):
        shares, said = epochs(train)
        assert np.allclose(shares, 1, atol=0.01) and "by their tokens" in said
    shares, said = epochs(name)
    assert shares == [1.0] and f"{name} (3 shards), 1.00 epochs" in said
    assert "by the weights given" in epochs([{"prefix": paths[0], "weight": 1}, paths[1]])[1]
    with pytest.raises(UserError, match=re.escape(f"lists {paths[1]} twice")):
        epochs([name, paths[1]])


def test_the_order_by_weights_is_as_it_was(tmp_path):
    """Digests of the version before sources could be shards."""
    _, merged = sharded(tmp_path, [[30] * 9, [20] * 9])
    write(tmp_path / "b", [40] * 12)
    train = [DataSource(prefix=merged, weight=1), DataSource(prefix=str(tmp_path / "b"), weight=0.3333333)]
    data = DataConfig(train=train, seq_len=10, valid_fraction=0.1)
    made = [build_dataset(data, split, 10_000).fingerprint for split in ("train", "valid")]
    assert made == ["b973b296d7db108e", "2a8f2f0467c2772f"]


def test_weights_that_cannot_be_compared_are_one_line():
    for train, message in (
        ([{"prefix": "a", "weight": "tokens"}, "b"], "1 of 2 sources have weight: tokens"),
        ([{"prefix": ["a", "b"], "weight": 2}], "needs weight: tokens"),
        ([{"prefix": "a", "weight": "tokns"}], "'tokns' is neither a number nor `tokens`"),
        ([{"prefix": "a", "weight": 0}], "above 0 and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(train=train)
