"""A source that recurs in a later stage of a run goes on where it was left."""

from collections import Counter

import pytest

from megatron_taipan.data.loader import build_dataset
from tests.train.toy import VOCAB, toy_config, write_data


def dataset(prefixes, seq_len=32, **data):
    return build_dataset(toy_config(prefixes, data={"seq_len": seq_len, **data}).data, "train", VOCAB)


def read_by(data, first, stop):
    """What samples first to stop - 1 are: source, and where in its stream they begin."""
    spans = [span for k in range(first, stop) for span in data._locate([k])]
    return [(span.reader.prefix, span.position) for span in spans]


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [write_data(folder / name, documents=60, seed=seed) for seed, name in enumerate(["web", "books", "code"])]


def test_over_three_blends_every_sample_of_an_epoch_comes_once(prefixes):
    web, books, code = prefixes
    alone = dataset(web)
    per_epoch = len(alone)
    stages = [(dataset(web), 11), (dataset([web, books]), 20), (dataset([code, web, books]), 3 * per_epoch)]
    first, read, seen = 0, {}, []
    for data, samples in stages:
        data.go_on(first, read)
        seen += read_by(data, first, first + samples)
        first += samples
        read |= data.read_after(first)
    of_web = [place for prefix, place in seen if prefix == web]
    assert len(of_web) > per_epoch
    assert of_web == [place for _, place in read_by(alone, 0, len(of_web))]  # as in a run that reads nothing else
    assert max(Counter(of_web[:per_epoch]).values()) == 1
    assert data.epochs(first)[web] == pytest.approx(len(of_web) / per_epoch)


def test_with_other_rows_it_keeps_its_epochs_and_comes_back_past_its_own_samples(prefixes):
    web, short = prefixes[0], dataset(prefixes[0])
    long, again = dataset(web, seq_len=64), dataset(web)
    ours = read_by(short, 0, 9)
    long.go_on(9, short.read_after(9))
    assert long.epochs(9)[web] == short.epochs(9)[web]
    assert read_by(long, 9, 12) == read_by(dataset(web, seq_len=64), -(-9 * len(long) // len(short)), 100)[:3]
    again.go_on(12, long.read_after(12))
    rest = read_by(again, 12, 12 + len(short) - 9 - 8)
    assert not set(rest) & set(ours) and len(set(rest)) == len(rest)


def test_a_stage_that_draws_nothing_of_a_source_leaves_its_place(prefixes):
    web, books, _ = prefixes
    short, again = dataset(web), dataset(web)
    between = dataset([{"prefix": web, "weight": 1}, {"prefix": books, "weight": 9}], seq_len=64)
    read = short.read_after(1)
    between.go_on(1, read)
    assert read_by(between, 1, 2)[0][0] == books
    again.go_on(2, read | between.read_after(2))
    assert read_by(again, 2, 5) == read_by(short, 1, 4)
