"""The fingerprint that a resume compares: another one wherever any sample holds other tokens."""

import warnings

import numpy as np

from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.data_config import DataConfig


def pair(path, base: int) -> str:
    """30 documents of 20 tokens."""
    with IndexedWriter(path, np.uint16) as writer:
        for number in range(30):
            writer.add_document(range(base + 20 * number, base + 20 * number + 20))
    return str(path)


def test_all_that_decides_about_samples_is_in_the_fingerprint(tmp_path):
    a, b = pair(tmp_path / "a", 0), pair(tmp_path / "b", 5000)
    base = {"train": [a, b], "seq_len": 8, "valid_fraction": 0.2, "seed": 1}
    changes = {
        "nothing": {},
        "seq_len": {"seq_len": 4},
        "seed": {"seed": 2},
        "held out": {"valid_fraction": 0.3},
        "one_document": {"one_document": True},
        "weights": {"train": [{"prefix": a, "weight": 2}, {"prefix": b, "weight": 1}]},
        "order": {"train": [b, a]},
        "one source": {"train": [a]},
        "validation of its own": {"valid": [b], "train": [a]},
    }
    fingerprints, contents = {}, {}
    for split in ("train", "valid"):
        for name, change in changes.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = build_dataset(DataConfig(**(base | change)), split, 10_000)
            fingerprints[name, split] = data.fingerprint
            contents[name, split] = data.batch(list(range(9)))["tokens"].tolist()
    assert len(set(map(str, contents.values()))) == len(contents)  # they really are other samples
    assert len(set(fingerprints.values())) == len(fingerprints)
    assert build_dataset(DataConfig(**base), "train", 9_000).fingerprint == fingerprints["nothing", "train"]
