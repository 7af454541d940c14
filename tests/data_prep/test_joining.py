"""What happens beside the tokenizing: joining parts, hashing, reading the tokenizer ahead, workers of one thread."""

import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.hashing import HashedFile
from data_prep.join import Joiner
from data_prep.prefetch_tokenizer import guess
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError

ROOT = Path(__file__).parents[2]


def parts(folder, lengths):
    """A job whose parts hold documents of these lengths, numbered tokens; and the documents."""
    documents, token = [], 0
    for number, inside in enumerate(lengths):
        tokens = np.arange(token, token + sum(inside), dtype=np.uint16)
        token += len(tokens)
        tokens.tofile(folder / f"{number}.bin")
        np.array(inside, "<i4").tofile(folder / f"{number}.len")
        documents += np.split(tokens, np.cumsum(inside)[:-1]) if inside else []
    job = SimpleNamespace(part=lambda n: str(folder / str(n)), units=lengths, dtype=np.dtype(np.uint16), marked=False)
    return job, [d.tolist() for d in documents]


def in_shards(documents, room):
    """Documents one after the other, a new shard where one does not fit."""
    shards, held = [[]], 0
    for document in documents:
        if shards[-1] and held + len(document) > room:
            shards.append([])
            held = 0
        shards[-1].append(document)
        held += len(document)
    return shards


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=1, max_size=6),
    room=st.one_of(st.none(), st.integers(1, 120)),
    random=st.randoms(use_true_random=False),
)
def test_parts_are_joined_in_order_whatever_order_they_come_in(lengths, room, random):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job, documents = parts(folder, lengths)
        order = list(range(len(lengths)))
        random.shuffle(order)
        with Joiner(job, str(folder / "out"), room) as joiner:
            for number in order:
                joiner.add(number)
            shards = joiner.finish()
            assert not list(folder.glob("out*.bin")) and not list(folder.glob("out*.idx"))
            joiner.commit()
        wanted = in_shards(documents, room) if room is not None else [documents]
        assert [shard["documents"] for shard in shards] == [len(shard) for shard in wanted]
        for shard, inside in zip(shards, wanted, strict=True):
            reader = IndexedReader(shard["prefix"])
            assert [reader.document(i).tolist() for i in range(reader.n_documents)] == inside
            content = Path(shard["prefix"] + ".bin").read_bytes()
            assert shard["bin_xxh3_128"] == xxhash.xxh3_128(content).hexdigest()
        assert not list(folder.glob("*.partial"))


def test_nothing_stays_of_shards_that_were_not_committed(tmp_path):
    job, _ = parts(tmp_path, [[3, 4], [5], [6]])
    before = set(tmp_path.iterdir())
    refused = pytest.raises(RuntimeError, match="part 1 of 3 was not added")
    with refused, Joiner(job, str(tmp_path / "out"), 5) as joiner:
        joiner.add(0)
        joiner.add(2)
        joiner.finish()
    assert set(tmp_path.iterdir()) == before


def test_what_stops_the_joining_stops_the_run(tmp_path):
    job, _ = parts(tmp_path, [[3], [4]])
    (tmp_path / "0.bin").write_bytes(b"1")
    refused = pytest.raises(UserError, match="shorter than its index says")
    with refused, Joiner(job, str(tmp_path / "o"), None) as joiner:
        joiner.add(0)
        joiner.add(1)
        joiner.finish()
    assert not list(tmp_path.glob("o.*"))


@given(st.lists(st.one_of(st.binary(max_size=50), st.just("mark"), st.just("back")), max_size=30))
def test_hash_of_a_file_that_goes_back(steps):
    with tempfile.TemporaryDirectory() as folder:
        file, content = HashedFile(f"{folder}/f"), b""
        mark, length = file.mark(), 0
        for step in steps:
            if step == "mark":
                mark, length = file.mark(), len(content)
            elif step == "back":
                file.go_back(mark)
                mark, content = file.mark(), content[:length]
            else:
                file.write(step)
                content += step
        assert file.close() == xxhash.xxh3_128(content).hexdigest()
        assert Path(folder, "f").read_bytes() == content


def test_the_fast_library_starts_no_thread_in_a_worker(gpt2_like):
    """Two workers on two cores would otherwise run four."""
    code = (
        "import os, sys\n"
        "from data_prep.fast import fast_backend_of\n"
        "from megatron_taipan.tokenizer.load import load_tokenizer\n"
        "fast_backend = fast_backend_of(load_tokenizer(sys.argv[1]), sys.argv[1])\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "fast_backend.encode_batch(['some words, again and again. ' * 3000] * 64)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, gpt2_like], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_what_is_read_ahead(gpt2_like, tmp_path):
    plain = ["tokenize", "--input", "x", "--tokenizer", gpt2_like]
    ahead = guess(plain)
    assert ahead is not None and ahead.path == gpt2_like and ahead.result() is not None
    for other in (
        ["verify", *plain[1:]],
        plain[:-1],
        [*plain, "--backend", "reference"],
        [*plain, "--allow-special"],
        [*plain[:-1], "tok.model"],
        [*plain[:-1], str(tmp_path / "missing.json")],
    ):
        assert guess(other) is None, other
    damaged = tmp_path / "tokenizer.json"
    damaged.write_text("{}")
    ahead = guess([*plain[:-1], str(damaged)])
    assert ahead is not None and ahead.result() is None  # `tokenize` says what is wrong with it
