"""Loss masks beside the tokens: found, multiplied into the batch, refused where they do not fit."""

import json
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.data.indexed import IndexedReader, IndexedWriter
from megatron_taipan.data.loader import build_dataset, make_loader
from megatron_taipan.data.permutation import Permutation, derive_key
from megatron_taipan.data.split import held_out_documents
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError


def write(prefix, documents, masks=None, dtype=np.uint16):
    for path, content, kind in ((prefix, documents, dtype), (f"{prefix}_loss_mask", masks, np.uint8)):
        if content is not None:
            with IndexedWriter(path, kind) as writer:
                for document in content:
                    writer.add_document(document)
    return str(prefix)


def numbered(lengths, base=1):
    """Documents of distinct ids."""
    ends = np.cumsum([base, *lengths])
    return [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]


def dataset(train, split="train", **options):
    data = DataConfig(train=train, **{"seq_len": 8, "valid_fraction": 0, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_dataset(data, split, 70_000)


@st.composite
def masked_corpora(draw):
    lengths = draw(st.lists(st.integers(0, 14), min_size=6, max_size=40))
    return lengths, [draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n in lengths]


@settings(max_examples=60, deadline=None)
@given(corpus=masked_corpora(), held=st.sampled_from([0, 0.3]), epoch=st.sampled_from([0, 3]))
def test_the_mask_of_every_label(tmp_path_factory, corpus, held, epoch):
    """Against a list of every token and a naive loop, with documents held out (streams of several ranges)."""
    lengths, masks = corpus
    seq_len = 10
    prefix = write(tmp_path_factory.mktemp("c") / "x", numbered(lengths), masks)
    reader = IndexedReader(prefix)
    out = set(held_out_documents(reader, held).tolist()) if held else set()
    ring = [(d, k) for d, n in enumerate(lengths) if d not in out for k in range(n)]
    if len(ring) <= seq_len or max(lengths) == 0 or min(lengths) > seq_len + 1:
        return
    data = dataset(prefix, seq_len=seq_len, valid_fraction=held, seed=3)
    key, per_epoch = derive_key("samples", 3, reader.fingerprint), len(ring) // seq_len
    turn, order = derive_key(key, epoch, "turn") % len(ring), Permutation(per_epoch, derive_key(key, epoch))
    batch = data.batch(list(range(epoch * per_epoch, (epoch + 1) * per_epoch)))
    for row in range(per_epoch):
        taken = [ring[(turn + order(row) * seq_len + k) % len(ring)] for k in range(seq_len + 1)]
        expected = []
        for t in range(seq_len):
            document, k = taken[t + 1]  # of the label
            begun = (document, 0) in taken[: t + 1]  # its document began here, and it is not its first token
            expected.append(float(begun and k > 0 and masks[document][k]))
        assert batch["loss_mask"][row].tolist() == expected


def test_a_blend_of_masked_and_plain_sources(tmp_path):
    """Their samples are those that each has alone; of the plain one all labels count but those across a border."""
    masks = [[0, 0, 0, 1, 1, 0, 1] for _ in range(40)]
    a = write(tmp_path / "a", numbered([7] * 40), masks)
    b = write(tmp_path / "b", numbered([9] * 40, base=1000), dtype=np.int32)
    data = dataset([{"prefix": a, "weight": 2}, {"prefix": b, "weight": 1}], seq_len=16)
    batch = data.batch(list(range(30)))
    for row in range(30):
        tokens, labels, mask = (batch[name][row].numpy() for name in ("tokens", "labels", "loss_mask"))
        if tokens[0] < 1000:
            document, place = (labels - 1) // 7, (labels - 1) % 7
            begins = (tokens - 1) % 7 == 0
            seen = np.array([(begins & ((tokens - 1) // 7 == d)).any() for d in document])
            assert mask.tolist() == (seen & np.isin(place, (3, 4, 6))).astype(float).tolist()
        else:
            assert mask.tolist() == ((labels - 1000) % 9 != 0).astype(float).tolist()
    assert {bool(batch["tokens"][row, 0] < 1000) for row in range(30)} == {True, False}
    again = pickle.loads(pickle.dumps(data)).batch(list(range(30)))
    assert all((again[name] == batch[name]).all() for name in batch)
    loader = make_loader(data, start=0, global_batch=30, micro_batch=30, dp_rank=0, dp_size=1, workers=1)
    assert all((value == batch[name]).all() for name, value in next(loader).items())


def test_the_order_stays_and_the_fingerprint_tells_of_the_mask(tmp_path):
    documents = numbered([7] * 40)
    bare = dataset(write(tmp_path / "a", documents))
    one = dataset(write(tmp_path / "a", documents, [[0, 0, 0, 1, 1, 0, 1]] * 40))
    ignored = dataset([{"prefix": str(tmp_path / "a"), "loss_mask": "ignore"}])
    other = dataset(write(tmp_path / "a", documents, [[0, 0, 0, 1, 1, 1, 1]] * 40))
    assert len({bare.fingerprint, one.fingerprint, other.fingerprint}) == 3
    assert ignored.fingerprint == bare.fingerprint
    rows = list(range(60))
    for data in (one, ignored, other):
        assert (data.batch(rows)["tokens"] == bare.batch(rows)["tokens"]).all()
    assert (ignored.batch(rows)["loss_mask"] == bare.batch(rows)["loss_mask"]).all()
    assert one.batch(rows)["loss_mask"].sum() < other.batch(rows)["loss_mask"].sum()


@pytest.mark.parametrize("name", ["x", "x-00003"])
def test_a_mask_that_is_missing(tmp_path, name):
    """Where the manifest, of the pair or of all shards, names one; and where it is required."""
    prefix = write(tmp_path / name, numbered([7] * 9))
    assert dataset(prefix).batch([0])["loss_mask"].sum() > 0
    with pytest.raises(UserError, match=f"{name}_loss_mask.idx does not exist and loss_mask: require"):
        dataset([{"prefix": prefix, "loss_mask": "require"}])
    shards = [{"prefix": f"x-{k:05d}", "loss_mask": {}} for k in range(3)] + [{"prefix": name, "loss_mask": {}}]
    (tmp_path / "x.json").write_text(json.dumps({"shards": shards}))
    with pytest.raises(UserError, match="its manifest names it"):
        dataset(prefix)
    assert dataset([{"prefix": prefix, "loss_mask": "ignore"}]).batch([0])["loss_mask"].sum() > 0
    del shards[-1]["loss_mask"]
    (tmp_path / "x.json").write_text(json.dumps({"shards": shards}))
    assert dataset(prefix)


def test_bad_masks(tmp_path):
    documents, good = numbered([7] * 9), [[0] * 6 + [1]] * 9
    for masks, words in (
        (good[:-1], "has 8 documents and .* has 9"),
        ([*good[:-1], [1]], "has 57 tokens and .* has 63"),
        ([[1] * 6, [1] * 8, *good[2:]], "document 0 has 6 tokens and that of .* has 7"),
    ):
        prefix = write(tmp_path / "x", documents, masks)
        with pytest.raises(UserError, match=words):
            dataset(prefix)
    (tmp_path / "x_loss_mask.bin").unlink()
    with pytest.raises(UserError, match="x_loss_mask.bin does not exist"):
        dataset(prefix)
    write(tmp_path / "x_loss_mask", good)  # uint16
    with pytest.raises(UserError, match="holds uint16, and a loss mask holds uint8"):
        dataset(prefix)
    data = dataset(write(tmp_path / "x", documents, [[2] * 7] * 9))
    with pytest.raises(UserError, match="holds 2, and a loss mask holds only 0 and 1"):
        data.batch([0])


def test_documents_that_no_sample_holds(tmp_path):
    lengths = [7, 30, 9, 10]
    prefix = write(tmp_path / "x", numbered(lengths), [[0] * (n - 1) + [1] for n in lengths])
    with pytest.warns(
        UserWarning, match=r"2 of 4 documents have more than data.seq_len \+ 1 = 9 tokens \(the longest 30\)"
    ):
        build_dataset(DataConfig(train=prefix, seq_len=8, valid_fraction=0), "train", 99)
    with pytest.raises(UserError, match="4 of 4 documents .* raise data.seq_len"):
        dataset(prefix, seq_len=5)
    with pytest.raises(UserError, match="data.one_document=true cuts its documents"):
        dataset(prefix, one_document=True)
    assert dataset([{"prefix": prefix, "loss_mask": "ignore"}], one_document=True)
