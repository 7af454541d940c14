"""Samples, splits, packing, order and the loader."""

import multiprocessing
import pickle
import signal
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.data.indexed import IndexedReader, IndexedWriter
from megatron_taipan.data.loader import build_dataset, make_loader
from megatron_taipan.data.permutation import Permutation, derive_key
from megatron_taipan.data.split import held_out_documents, split_documents
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError

EOD = 0


def corpus(path, lengths, base=1, dtype=np.uint16):
    """Documents of distinct rising ids, each ended by EOD, so that every token tells where it comes from."""
    at = base
    with IndexedWriter(path, dtype) as writer:
        for length in lengths:
            writer.add_document([*range(at, at + length), EOD])
            at += length
    return str(path)


def dataset(prefix, split="train", vocab_size=70_000, **options):
    return build_dataset(DataConfig(train=prefix, **{"seq_len": 8, "valid_fraction": 0, **options}), split, vocab_size)


def epoch_inputs(data, epoch=0):
    return torch.cat([data[i]["tokens"] for i in range(epoch * len(data), (epoch + 1) * len(data))])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), seq_len=st.integers(1, 20), seed=st.integers(0, 9)
)
def test_every_token_is_an_input_and_a_label_once_an_epoch(tmp_path_factory, lengths, seq_len, seed):
    prefix = corpus(tmp_path_factory.mktemp("c") / "x", lengths)
    total = sum(lengths) + len(lengths)
    if total <= seq_len:
        with pytest.raises(UserError, match=f"{total} tokens"):
            dataset(prefix, seq_len=seq_len)
        return
    data = dataset(prefix, seq_len=seq_len, seed=seed)
    assert len(data) == total // seq_len
    for epoch in (0, 3):
        for part in ("tokens", "labels"):
            ids = torch.cat([data[i][part] for i in range(epoch * len(data), (epoch + 1) * len(data))]).numpy()
            real = ids[ids != EOD]
            assert len(np.unique(real)) == len(real)
            assert len(ids) > total - seq_len


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=4, max_size=30), masked=st.booleans(), held=st.sampled_from([0, 0.3])
)
def test_documents_within_a_sample(tmp_path_factory, lengths, masked, held):
    """seq_idx, loss_mask and labels against what the ids themselves say."""
    prefix = corpus(tmp_path_factory.mktemp("c") / "x", lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)  # document of id 1, 2, ...
    try:
        data = dataset(prefix, seq_len=16, mask_documents=masked, valid_fraction=held)
    except UserError:
        return
    for i in range(len(data)):
        sample = data[i]
        tokens, labels, seq_idx = sample["tokens"], sample["labels"], sample["seq_idx"]
        assert sample["sample"].item() == i
        assert torch.equal(tokens[1:], labels[:-1])
        # a document ends with its EOD and nowhere else
        after_eod = torch.cat([torch.zeros(1, dtype=torch.int64), (tokens[:-1] == EOD).cumsum(0)])
        assert seq_idx.tolist() == (after_eod if masked else torch.zeros(16)).tolist()
        assert sample["loss_mask"].tolist() == (tokens != EOD).float().tolist()
        for number in seq_idx.unique() if masked else []:
            ids = tokens[(seq_idx == number) & (tokens != EOD)] - 1
            assert len(np.unique(owner[ids.numpy()])) <= 1
        assert [v.dtype for v in sample.values()] == [
            torch.int64, torch.int64, torch.float32, torch.int32, torch.int64,
        ]  # fmt: skip


def test_epochs_differ_in_order_and_in_cuts(tmp_path):
    data = dataset(corpus(tmp_path / "x", [7] * 200), seq_len=16)
    first, second = epoch_inputs(data, 0), epoch_inputs(data, 1)
    assert not torch.equal(first, second)
    assert {tuple(row.tolist()) for row in first.view(-1, 16)}.isdisjoint(
        {tuple(row.tolist()) for row in second.view(-1, 16)}
    )


def test_order_follows_the_seed_and_the_data_only(tmp_path):
    prefix = corpus(tmp_path / "x", [9] * 100)
    a, b, c = dataset(prefix), dataset(prefix), dataset(prefix, seed=5)
    assert torch.equal(epoch_inputs(a), epoch_inputs(b)) and a.fingerprint == b.fingerprint
    assert not torch.equal(epoch_inputs(a), epoch_inputs(c)) and a.fingerprint != c.fingerprint
    # any order of access gives the same samples
    backwards = [a[i]["tokens"].tolist() for i in reversed(range(3 * len(a)))]
    assert backwards[::-1] == [b[i]["tokens"].tolist() for i in range(3 * len(b))]


def test_split_by_document_is_random_disjoint_and_complete(tmp_path):
    reader = IndexedReader(corpus(tmp_path / "x", [5] * 400))
    train, valid = split_documents(reader, 0.1)
    seen = {}
    for name, stream in (("train", train), ("valid", valid)):
        out = np.empty(stream.n_tokens, np.uint16)
        stream.read_into(0, out)
        seen[name] = {(int(i) - 1) // 5 for i in out if i != EOD}
        assert len(out) == len(seen[name]) * 6  # whole documents
    assert len(seen["valid"]) == 40 and seen["train"].isdisjoint(seen["valid"])
    assert seen["train"] | seen["valid"] == set(range(400))
    assert 120 < np.mean(sorted(seen["valid"])) < 280  # by position they would all be at an end


def test_validation_sets(tmp_path):
    prefix, other = corpus(tmp_path / "x", [9] * 100), corpus(tmp_path / "y", [9] * 50, base=5000)
    held = dataset(prefix, "valid", valid_fraction=0.2)
    assert set(epoch_inputs(held).tolist()).isdisjoint(
        set(epoch_inputs(dataset(prefix, valid_fraction=0.2)).tolist()) - {0}
    )
    own = dataset(prefix, "valid", valid=other)
    assert min(set(epoch_inputs(own).tolist()) - {0}) >= 5000
    assert len(epoch_inputs(dataset(prefix, valid=other, valid_fraction=0.2))) == 1000  # nothing held out then


def test_a_source_with_nothing_held_out_is_left_out_of_validation(tmp_path):
    """The others are validated on as they would be without it, and it is trained on."""
    a, b = corpus(tmp_path / "a", [9] * 60), corpus(tmp_path / "b", [9] * 60, base=2000)
    small, single = corpus(tmp_path / "small", [3] * 20, base=4000), corpus(tmp_path / "single", [50], base=5000)
    options = {"valid_fraction": 0.1, "seq_len": 16}
    assert set(dataset([a, small, single, b], **options).epochs(9)) == {a, small, single, b}
    trained = epoch_inputs(dataset([a, small, single, b], **options))
    assert set(range(5000, 5048)) <= set(trained.tolist())  # all of the single document
    with pytest.warns(UserWarning) as caught:
        valid = dataset([a, small, single, b], "valid", **options)
    said = [str(warning.message) for warning in caught]
    assert "small is left out of validation" in said[0] and "8 tokens" in said[0] and "= 17" in said[0]
    assert "single is left out of validation" in said[1] and "1 document" in said[1] and len(said) == 2
    assert torch.equal(epoch_inputs(valid), epoch_inputs(dataset([a, b], "valid", **options)))
    for nothing in (small, [small], [single, small]):  # where none is left it is an error
        with pytest.raises(UserError, match="validation: .*set data.valid"):
            dataset(nothing, "valid", **options)
    with pytest.raises(UserError, match="validation: .*set data.valid"):
        dataset([small, single], "valid", **options)


def test_long_samples_never_cross_documents(tmp_path):
    lengths = [3, 100, 7, 64, 63, 40, 200]
    data = dataset(corpus(tmp_path / "x", lengths), seq_len=64, one_document=True)
    assert len(data) == sum(length // 64 for length in lengths)
    inputs = []
    for i in range(2 * len(data)):
        sample = data[i]
        assert sample["seq_idx"].unique().tolist() == [0] and sample["loss_mask"].min() == 1
        assert (sample["tokens"].diff() == 1).all()
        inputs += sample["tokens"].tolist() if i < len(data) else []
    assert len(set(inputs)) == len(inputs)
    with pytest.raises(UserError, match="the longest has 201"):
        dataset(str(tmp_path / "x"), seq_len=500, one_document=True)


@pytest.mark.parametrize(("fraction", "held"), [(0.27, 3), (0.24, 2), (0.25, 2), (0.01, 1), (0.99, 9)])
def test_held_out_is_the_nearest_number_of_documents(tmp_path, fraction, held):
    """Of ten; at least one, and at most all but one."""
    documents = held_out_documents(IndexedReader(corpus(tmp_path / "x", [5] * 10)), fraction)
    assert len(set(documents.tolist())) == held


def test_long_samples_with_held_out_documents(tmp_path):
    prefix = corpus(tmp_path / "x", [50] * 40)
    both = [dataset(prefix, split, seq_len=20, one_document=True, valid_fraction=0.25) for split in ("train", "valid")]
    assert [len(d) for d in both] == [60, 20]
    train, valid = (set((epoch_inputs(d).numpy() - 1) // 50) for d in both)
    assert train.isdisjoint(valid)


def blended(tmp_path):
    a, b = corpus(tmp_path / "a", [9] * 40), corpus(tmp_path / "b", [9] * 10, base=1000)
    return dataset([{"prefix": a, "weight": 3}, {"prefix": b, "weight": 1}])


def test_blend_draws_each_source_in_its_share_and_counts_epochs(tmp_path):
    data = blended(tmp_path)
    from_b = [bool((data[i]["tokens"] > 999).any()) for i in range(400)]
    for i in range(1, 401):
        assert abs(sum(from_b[:i]) - i / 4) < 1
    a, b = data.epochs(400).values()
    assert a == 300 / 50 and b == 100 / (100 // 8)


def take(loader, n):
    return [next(loader) for _ in range(n)]


def order(data, start, global_batch, micro_batch, dp_size, steps):
    """Samples in the order in which a job of this layout uses them."""
    seen = []
    loaders = [
        make_loader(data, start=start, global_batch=global_batch, micro_batch=micro_batch, dp_rank=r, dp_size=dp_size)
        for r in range(dp_size)
    ]
    for _ in range(steps):
        step = []
        for _ in range(global_batch // (dp_size * micro_batch)):
            step += [s for loader in loaders for s in next(loader)["sample"].tolist()]
        seen.append(step)
    return seen


def test_any_layout_takes_the_same_samples_in_a_step(tmp_path):
    data = blended(tmp_path)
    for micro_batch, dp_size in ((1, 1), (2, 2), (4, 3), (12, 1), (1, 12)):
        steps = order(data, 24, 12, micro_batch, dp_size, 3)
        assert [sorted(s) for s in steps] == [list(range(24 + 12 * s, 36 + 12 * s)) for s in range(3)]


def test_changing_batch_and_world_mid_run_neither_repeats_nor_skips(tmp_path):
    data = blended(tmp_path)
    consumed, seen = 0, []
    for global_batch, micro_batch, dp_size, steps in ((8, 2, 2, 3), (12, 3, 4, 2), (5, 5, 1, 4)):
        for step in order(data, consumed, global_batch, micro_batch, dp_size, steps):
            seen += sorted(step)
        consumed += global_batch * steps
    assert seen == list(range(consumed))


def test_workers_give_the_same_batches(tmp_path):
    data = blended(tmp_path)
    options = {"start": 3, "global_batch": 8, "micro_batch": 2, "dp_rank": 1, "dp_size": 2}
    plain, forked = (take(make_loader(data, workers=w, **options), 7) for w in (0, 2))
    for a, b in zip(plain, forked, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert plain[0]["tokens"].shape == (2, 8)


def test_workers_ignore_signals_meant_for_the_trainer(tmp_path):
    loader = make_loader(blended(tmp_path), start=0, global_batch=2, micro_batch=2, dp_rank=0, dp_size=1, workers=2)
    next(loader)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            command = f"kill -{name.value} {worker.pid}"  # by another than their parent; /bin/kill is not everywhere
            subprocess.run(["sh", "-c", command], check=True)
    assert [b["sample"].tolist() for b in take(loader, 20)] == [[2 * i, 2 * i + 1] for i in range(1, 21)]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), masked=st.booleans())
def test_a_batch_is_its_samples(tmp_path_factory, data, masked):
    """Sources of different types and with many or few documents a sample, in any order, against sample by sample."""
    folder = tmp_path_factory.mktemp("c")
    lengths = [data.draw(st.lists(st.integers(0, 30), min_size=8, max_size=30)) for _ in range(2)]
    a = corpus(folder / "a", [*lengths[0], 40])
    b = corpus(folder / "b", [*lengths[1], *[0, 1] * 20], base=1000, dtype=np.int32)
    both = dataset([{"prefix": a, "weight": 2}, {"prefix": b, "weight": 1}], seq_len=40, mask_documents=masked)
    indices = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    batch = both.batch(indices)
    for row, index in enumerate(indices):
        ids, begins = both.tokens(index)
        assert batch["tokens"][row].tolist() == ids[:-1].tolist() and batch["labels"][row].tolist() == ids[1:].tolist()
        assert batch["loss_mask"][row].tolist() == [float(i + 1 not in begins) for i in range(40)]
        number = [sum(begin <= i for begin in begins) for i in range(40)]
        assert batch["seq_idx"][row].tolist() == (number if masked else [0] * 40)


def plain_samples(prefix, lengths, held, seq_len, seed):
    """The order as it is defined, in Python integers and a list of every token: number -> ids and begins."""
    reader = IndexedReader(prefix)
    out = set(held_out_documents(reader, held).tolist()) if held else set()
    ring = [(d, k) for d, n in enumerate(lengths) if d not in out for k in range(n + 1)]
    documents = [reader.document(d).tolist() for d in range(len(lengths))]
    key = derive_key("samples", seed, reader.fingerprint)

    def sample(number):
        epoch, index = divmod(number, len(ring) // seq_len)
        turn = derive_key(key, epoch, "turn") % len(ring)
        start = turn + Permutation(len(ring) // seq_len, derive_key(key, epoch))(index) * seq_len
        taken = [ring[(start + k) % len(ring)] for k in range(seq_len + 1)]
        return [documents[d][k] for d, k in taken], [at for at, (_, k) in enumerate(taken) if at and not k]

    return sample


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=8, max_size=40),
    held=st.sampled_from([0, 0.3]),
    batch=st.integers(1, 5),
    data=st.data(),
)
def test_any_access_follows_the_plain_formula(tmp_path_factory, lengths, held, batch, data):
    """Regular batches, whose spans are found ahead and over many epochs, and jumps between them."""
    prefix = corpus(tmp_path_factory.mktemp("c") / "x", lengths)
    try:
        both = dataset(prefix, seq_len=10, valid_fraction=held, seed=3)
    except UserError:
        return
    plain = plain_samples(prefix, lengths, held, 10, 3)
    for start in (0, data.draw(st.integers(0, 10**6))):
        distance = data.draw(st.integers(batch, 90))
        for at in range(start, start + 4 * distance, distance):
            rows = both.batch(list(range(at, at + batch)))
            for row in range(batch):
                ids, begins = plain(at + row)
                assert rows["tokens"][row].tolist() == ids[:-1] and rows["labels"][row].tolist() == ids[1:]
                assert rows["loss_mask"][row].tolist() == [float(k + 1 not in begins) for k in range(10)]
                assert rows["seq_idx"][row].tolist() == [sum(b <= k for b in begins) for k in range(10)]
                assert rows["sample"][row] == at + row


def test_spans_are_found_ahead_where_batches_come_at_one_distance(tmp_path):
    data = dataset(corpus(tmp_path / "x", [9] * 100))
    asked = []
    find = data._locate.find
    data._locate.find = lambda indices: asked.append(len(indices)) or find(indices)
    for at in range(0, 1024, 8):
        data.batch([at, at + 1])
    assert asked == [2, 2, 512]  # 256 batches of 2
    data.batch([7, 3])
    assert asked[3:] == [2]


def test_memory_serves_again_only_when_nobody_holds_it(tmp_path):
    data = dataset(corpus(tmp_path / "x", [9] * 100))
    held = [data.batch([i, i + 1])[name] for i in range(8) for name in ("labels", "seq_idx")]
    row = data.batch([50, 51])["tokens"][1]  # a part of a batch holds all of it
    array = data.batch([60, 61])["tokens"].numpy()
    places = {data.batch([i, i + 1])["tokens"].data_ptr() for i in range(20)}
    assert len(places) <= 2
    again = dataset(str(tmp_path / "x"))
    for i, labels, seq_idx in zip(range(8), held[::2], held[1::2], strict=True):
        assert torch.equal(labels[1], again[i + 1]["labels"]) and torch.equal(seq_idx[1], again[i + 1]["seq_idx"])
    assert torch.equal(row, again[51]["tokens"]) and array[1].tolist() == again[61]["tokens"].tolist()


@pytest.mark.parametrize(
    ("one_document", "per_epoch", "digest"), [(False, 256, "6b5ffbe9f74d875f"), (True, 113, "28c2ad859d36ffd3")]
)
def test_the_order_of_earlier_versions(tmp_path, one_document, per_epoch, digest):
    """A run that is resumed with a newer version goes on in the same order."""
    a = corpus(tmp_path / "a", [(i * 7) % 41 for i in range(300)])
    b = corpus(tmp_path / "b", [(i * 11) % 90 for i in range(60)], base=9000, dtype=np.int32)
    weighted = [{"prefix": a, "weight": 0.7}, {"prefix": b, "weight": 0.3}]
    data = dataset(weighted, seq_len=32, valid_fraction=0.1, seed=4, one_document=one_document)
    assert len(data) == per_epoch
    content = sha256()
    for at in range(0, 1200, 4):
        batch = data.batch(list(range(at, at + 4)))
        for name in sorted(batch):
            content.update(batch[name].numpy().tobytes())
    assert content.hexdigest()[:16] == digest


def test_batch_that_does_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"global_batch=8 .* 3 \* 2 = 6 \(remainder 2\)"):
        make_loader(blended(tmp_path), start=0, global_batch=8, micro_batch=2, dp_rank=0, dp_size=3)


def test_a_dataset_travels_to_another_process(tmp_path):
    data = blended(tmp_path)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(data[17]["tokens"], again[17]["tokens"])


def test_ids_beyond_the_vocabulary(tmp_path):
    prefix = corpus(tmp_path / "x", [50])
    assert len(dataset(prefix, vocab_size=51))
    with pytest.raises(UserError, match="x.bin holds id 50 at token 49 .in document 0. and .* has 50 ids"):
        dataset(prefix, vocab_size=50)
    # far into a file it is found when the sample is read
    data = dataset(prefix, vocab_size=51)
    data.vocab_size = 20
    with pytest.raises(UserError, match="vocabulary has 20"):
        epoch_inputs(data)


@pytest.mark.parametrize(
    ("bad", "message"), [(-5, "ids are never negative"), (2_000_000_000, "vocabulary has 100 ids")]
)
def test_an_id_outside_the_vocabulary_is_named_with_its_position(tmp_path, bad, message):
    """At the start, and when a sample is read whose span goes round the held-out documents."""
    prefix = corpus(tmp_path / "x", [4] * 16, dtype=np.int32)
    stored = np.fromfile(prefix + ".bin", "<i4")
    held = held_out_documents(IndexedReader(prefix), 0.3).tolist()
    at = 5 * next(d for d in range(1, 16) if d - 1 in held and d not in held) + 2
    good = dataset(prefix, vocab_size=100, valid_fraction=0.3)
    for index, span in enumerate(good._locate([*range(len(good))])):
        assert stored[[span.token(number) for number in range(9)]].tolist() == good.tokens(index)[0].tolist()
    stored[at] = bad
    stored.tofile(prefix + ".bin")
    wanted = f"x.bin holds id {bad} at token {at} .in document {at // 5}.*{message}"
    with pytest.raises(UserError, match=wanted):
        dataset(prefix, vocab_size=100)
    with pytest.raises(UserError, match=wanted):
        epoch_inputs(good)


def test_an_error_in_a_worker_is_the_same_error(tmp_path):
    data = dataset(corpus(tmp_path / "x", [50]))
    data.vocab_size = 20
    said = []
    for workers in (0, 2):
        loader = make_loader(data, start=0, global_batch=6, micro_batch=6, dp_rank=0, dp_size=1, workers=workers)
        try:  # `pytest.raises` would keep the loader alive
            next(loader)
        except UserError as error:
            said.append(str(error))
    assert len(said) == 2 and said[0] == said[1] and "\n" not in said[0]


NOT_BEGUN = "the 1 loader processes did not begin within 0.3 s in 3 tries; data.workers=0 loads in the training process"


@pytest.mark.parametrize("hangs, workers, begin_s, printed", [(1, 2, 3, "[0, 1, 2]"), (3, 1, 0.3, NOT_BEGUN)])
def test_workers_that_hang_as_they_are_forked_are_forked_again(tmp_path, hangs, workers, begin_s, printed):
    """A lock that another thread held stops a child before any of its own code: here the first ones sleep there."""
    code = f"""
import itertools, os, time
from megatron_taipan.data_config import DataConfig
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.data.workers import start_workers
from megatron_taipan.errors import UserError
data = build_dataset(DataConfig(train={corpus(tmp_path / "x", [50])!r}, seq_len=8, valid_fraction=0), "train", 99)
forks = itertools.count()
os.register_at_fork(before=lambda: next(forks), after_in_child=lambda: time.sleep(99 * (next(forks) <= {hangs})))
try:
    results = start_workers(data, lambda: ([i] for i in range(3)), {workers}, begin_s={begin_s})
    print([int(batch["sample"]) for batch in results])
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, printed) and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("started again") == hangs


def test_a_program_with_workers_ends(tmp_path):
    """Though its loader lives to the end, or is collected with a traceback when its queues are gone already."""
    code = f"""
from megatron_taipan.data_config import DataConfig
from megatron_taipan.data.loader import build_dataset, make_loader
data = build_dataset(DataConfig(train={corpus(tmp_path / "x", [50])!r}, seq_len=8, valid_fraction=0), "train", 99)
loader = make_loader(data, start=0, global_batch=2, micro_batch=2, dp_rank=0, dp_size=1, workers=2)
print(next(loader)["sample"].tolist())
def fail():
    data.vocab_size = 20
    loader = make_loader(data, start=0, global_batch=2, micro_batch=2, dp_rank=0, dp_size=1, workers=1)
    try:
        for _ in range(9):
            next(loader)
    except Exception as error:
        caught = error  # with the frame that holds it
fail()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1]\n", "")


def test_one_place_twice_under_two_names(tmp_path):
    prefix = corpus(tmp_path / "x", [50])
    (tmp_path / "link.bin").symlink_to(tmp_path / "x.bin")
    (tmp_path / "link.idx").symlink_to(tmp_path / "x.idx")
    for other in (f"{tmp_path}/./x", str(tmp_path / "link")):
        with pytest.raises(UserError, match="twice"):
            dataset([prefix, other])


def test_long_samples_of_empty_documents_only(tmp_path):
    """The one document with text is held out."""
    for seed in range(20):
        with IndexedWriter(tmp_path / "x", np.uint16) as writer:
            for text in ([], [], [*range(1, 40 + seed)], []):
                writer.add_document(text)
        if held_out_documents(IndexedReader(tmp_path / "x"), 0.25).tolist() == [2]:
            break
    with pytest.raises(UserError, match="the longest has 0"):
        dataset(str(tmp_path / "x"), valid_fraction=0.25, one_document=True)


def test_bad_input(tmp_path):
    prefix = corpus(tmp_path / "x", [50])
    with pytest.raises(UserError, match="1 document"):
        dataset(prefix, valid_fraction=0.1)
    with pytest.raises(UserError, match="no validation data"):
        dataset(prefix, "valid")
    with pytest.raises(UserError, match="twice"):
        dataset([prefix, prefix])
    with IndexedWriter(tmp_path / "empty", np.uint16):
        pass
    with pytest.raises(UserError, match="holds no tokens"):
        dataset(str(tmp_path / "empty"))
    two = corpus(tmp_path / "two", [50, 3])
    with pytest.raises(UserError, match="validation: .*valid_fraction"):
        dataset(two, "valid", valid_fraction=0.5, seq_len=100)
