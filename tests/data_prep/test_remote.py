"""Remote inputs: the bytes of a run on local files, through fsspec's memory store and a web server on this machine."""

import gzip
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from data_prep import cli, remote
from megatron_taipan.errors import UserError
from tests.durable import killed_at, watched_renames

TEXTS = {f"part_{n}.jsonl{'.gz' * (n % 2)}": [f"text {n} {i}" for i in range(300)] for n in (1, 2, 10)}


def content(name):
    raw = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[name]).encode()
    return gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw


@pytest.fixture
def store():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for name in TEXTS:
        fs.pipe(f"/corpus/{name}", content(name))
    fs.pipe("/corpus/deep/notes.md", b"x")
    fs.pipe("/corpus/.ipynb_checkpoints/part_1-checkpoint.jsonl", b"x")
    yield fs
    fs.store.clear()


@pytest.fixture
def want(tmp_path, model):
    (tmp_path / "local").mkdir()
    for name in TEXTS:
        (tmp_path / "local" / name).write_bytes(content(name))
    assert tokenize(tmp_path, model, "want", tmp_path / "local") == 0
    return result(tmp_path, "want")


def tokenize(folder, model, name, *inputs):
    args = ["tokenize", "--tokenizer", model, "--output", folder / name, "--input", *inputs]
    return cli.main([str(arg) for arg in args])


def result(folder, name):
    return [(folder / f"{name}{ending}").read_bytes() for ending in (".bin", ".idx")]


@pytest.mark.parametrize("given", ["memory://corpus", "memory://corpus/*.jsonl*", "each"])
def test_the_bytes_of_local_files(tmp_path, model, store, want, capsys, given):
    urls = [f"memory://corpus/{name}" for name in TEXTS]
    capsys.readouterr()
    assert tokenize(tmp_path, model, "o", *(urls if given == "each" else [given])) == 0
    told = capsys.readouterr().out
    assert result(tmp_path, "o") == want and ("passed over 1 .jsonl, 1 .md" in told) == (given == "memory://corpus")
    inputs = json.loads((tmp_path / "o.json").read_text())["inputs"]
    assert [entry["path"] for entry in inputs] == [f"memory:///corpus/{name}" for name in TEXTS]
    assert [entry["bytes"] for entry in inputs] == [len(content(name)) for name in TEXTS]
    assert all(entry["etag"] for entry in inputs) and not (tmp_path / "o.spool").exists()
    assert tokenize(tmp_path, model, "o", *(urls if given == "each" else [given])) == 0
    told = capsys.readouterr().out
    assert "complete already" in told and "fetching" not in told


def test_splits_are_told_of(tmp_path, model, store, capsys):
    for name in ("train-1", "train-2", "test-1"):
        store.pipe(f"/set/{name}.jsonl", content("part_2.jsonl"))
    assert tokenize(tmp_path, model, "o", "memory://set") == 0
    assert "several splits are read together, by their names: 2 train, 1 test" in capsys.readouterr().out


def test_a_transfer_that_breaks_off_goes_on_with_what_is_missing(tmp_path, model, store, want, capsys, monkeypatch):
    real, fetched = remote._blocks, []

    def breaking(url):
        fetched.append(url[-8:])
        for block in real(url):
            if len(fetched) == 2:
                yield block[:100]
                with remote._told(url):
                    raise ConnectionError("reset by peer\nonce more")
            yield block

    monkeypatch.setattr(remote, "_blocks", breaking)
    capsys.readouterr()
    assert tokenize(tmp_path, model, "o", "memory://corpus") == 2
    error = capsys.readouterr().err
    assert "part_2.jsonl cannot be read: reset by peer once more" in error and error.count("\n") == 1
    assert not (tmp_path / "o.bin").exists()
    assert tokenize(tmp_path, model, "o", "memory://corpus") == 0
    assert fetched == ["jsonl.gz", "_2.jsonl", "_2.jsonl", "10.jsonl"] and result(tmp_path, "o") == want


def test_a_file_that_changes_is_another_input(tmp_path, model, store, capsys, monkeypatch):
    url = "memory://corpus/part_2.jsonl"
    assert tokenize(tmp_path, model, "o", url) == 0
    store.pipe("/corpus/part_2.jsonl", content("part_2.jsonl"))  # the same bytes, written later
    assert tokenize(tmp_path, model, "o", url) == 2
    assert "made from other inputs" in capsys.readouterr().err
    real = remote._blocks

    def changing(url):
        yield from real(url)
        store.pipe("/corpus/part_2.jsonl", content("part_10.jsonl"))

    monkeypatch.setattr(remote, "_blocks", changing)
    assert tokenize(tmp_path, model, "new", url) == 2
    assert "changed while it was fetched" in capsys.readouterr().err
    monkeypatch.setattr(remote, "_blocks", lambda url: iter([b"short"]))
    assert tokenize(tmp_path, model, "new", url) == 2
    assert "broke off (5 of " in capsys.readouterr().err and not (tmp_path / "new.bin").exists()


def test_what_cannot_be_read_is_one_line(tmp_path, model, store, capsys, monkeypatch):
    for url, message in (
        ("memory://nothing/*", "gives no file of a known kind (nothing is there)"),
        ("memory://corpus/deep", "gives no file of a known kind (1 .md)"),
        ("memory://corpus/deep/notes.md", "gives no file of a known kind (1 .md)"),
        ("nosuch://x/a.jsonl", "nosuch"),
    ):
        assert tokenize(tmp_path, model, "o", url) == 2
        error = capsys.readouterr().err
        assert message in error and url in error and error.count("\n") == 1
    assert tokenize(tmp_path, model, "o", "memory://corpus/part_2.jsonl", "memory://corpus") == 2
    assert "named twice" in capsys.readouterr().err

    def lacking(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote, "_store", lacking)
    assert tokenize(tmp_path, model, "o", "s3://bucket/a.jsonl") == 2
    error = capsys.readouterr().err
    assert "megatron-taipan[remote]" in error and "s3fs" in error and error.count("\n") == 1


@pytest.fixture
def web():
    """A server with ETags; its `asked` holds the requests, `files` what it has."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            self.server.asked.append((self.command, self.path))
            data = self.server.files.get(self.path.partition("?")[0])
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.send_header("ETag", '"' + hashlib.md5(data or b"").hexdigest() + '"')
            self.end_headers()
            if body and data:
                self.wfile.write(data)

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *args): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked = {f"/{name}": content(name) for name in TEXTS}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_web_server(tmp_path, model, web, want, capsys):
    pytest.importorskip("aiohttp")
    base = f"http://127.0.0.1:{web.server_address[1]}"
    urls = [f"{base}/{name}?download=true" for name in TEXTS]
    assert tokenize(tmp_path, model, "o", *urls) == 0
    assert result(tmp_path, "o") == want
    inputs = json.loads((tmp_path / "o.json").read_text())["inputs"]
    assert [entry["path"] for entry in inputs] == urls
    assert [entry["etag"].strip('"') for entry in inputs] == [hashlib.md5(content(name)).hexdigest() for name in TEXTS]
    web.files["/part_2.jsonl"] = content("part_10.jsonl")
    capsys.readouterr()
    assert tokenize(tmp_path, model, "o", *urls) == 2
    assert "made from other inputs" in capsys.readouterr().err
    assert tokenize(tmp_path, model, "o", f"{base}/none.jsonl") == 2
    error = capsys.readouterr().err
    assert "none.jsonl cannot be read" in error and error.count("\n") == 1


def test_files_of_one_name_in_two_folders_are_two(tmp_path, model, store):
    texts = {f"/shelf/{folder}/part.jsonl": [f"text {folder} {i}" for i in range(9)] for folder in ("a", "b")}
    for path, inside in texts.items():
        store.pipe(path, "".join(json.dumps({"text": text}) + "\n" for text in inside).encode())
        (tmp_path / "local" / path[7]).mkdir(parents=True)
        (tmp_path / "local" / path[7:]).write_bytes(store.cat(path))
    assert tokenize(tmp_path, model, "want", tmp_path / "local") == 0
    assert tokenize(tmp_path, model, "o", "memory://shelf") == 0
    assert result(tmp_path, "o") == result(tmp_path, "want")


def test_a_kill_after_a_transfer_leaves_no_earlier_content_under_the_new_note(tmp_path, store, monkeypatch):
    """The file has changed since it was fetched; the process ends before any of the calls that give names."""
    url, folder = "memory://corpus/part_2.jsonl", str(tmp_path / "spool")
    for number in range(1, 4):
        store.pipe("/corpus/part_2.jsonl", content("part_2.jsonl"))
        ((place, _),) = (first := remote.find(url, folder)).items()
        remote.fetch(first)
        store.pipe("/corpus/part_2.jsonl", content("part_10.jsonl"))
        second = remote.find(url, folder)
        with killed_at(monkeypatch, number):
            remote.fetch(second)
        remote.fetch(second)
        with open(place, "rb") as file:
            assert file.read() == content("part_10.jsonl")


def test_what_was_fetched_is_on_the_disk_before_it_has_its_name(tmp_path, store, monkeypatch):
    with watched_renames(monkeypatch) as seen:
        remote.fetch(remote.find("memory://corpus", str(tmp_path / "spool")))
    assert len(seen.names) == len(TEXTS)


def test_a_change_is_seen_in_a_store_that_remembers_what_it_listed(tmp_path, store, monkeypatch):
    """As s3fs, gcsfs and hf do, which list a folder once."""

    class Remembering:
        def __init__(self):
            self.listed = {}

        def info(self, path):
            return self.listed.setdefault(path, store.info(path))

        def invalidate_cache(self):
            self.listed.clear()

        def __getattr__(self, name):
            return getattr(store, name)

    fs, path = Remembering(), "/corpus/part_2.jsonl"
    monkeypatch.setattr(remote, "_store", lambda url: (fs, path))
    sources = remote.find("memory://corpus/part_2.jsonl", str(tmp_path / "spool"))
    read = fs.open

    def changing(path, mode):
        file = read(path, mode)
        content = store.cat(path)
        store.pipe(path, content.replace(b"text 2", b"text 3"))  # of the same size
        return file

    monkeypatch.setattr(fs, "open", changing, raising=False)
    with pytest.raises(UserError, match="changed while it was fetched"):
        remote.fetch(sources)
