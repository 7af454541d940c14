"""The corpus: each document once and no more than there is, copies on request only, HTML as what it shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import corpus
from benchmarks.corpus import Distinct, build_corpus, text_of_html, translated, write_distinct
from megatron_taipan.errors import UserError


def page(number: int) -> str:
    """40 long lines that no page of another number has."""
    return "\n".join(f"line {line} of page {number} says something at length, {number * line}" for line in range(40))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache whose two packages are there already: 30 text files, of which 10 are distinct."""
    for package in ("one-doc", "two-doc"):
        (tmp_path / "packages" / package / "usr").mkdir(parents=True)
    for number in range(10):
        for package, name, text in (
            ("one-doc", f"{number}.txt", page(number)),
            ("two-doc", f"{number}.txt", page(number)),  # the same file in another package
            ("two-doc", f"{number}-new.txt", page(number) + f"\nand one line that only this version has, {number}"),
        ):
            (tmp_path / "packages" / package / "usr" / name).write_text(text)
    monkeypatch.setattr(corpus, "PACKAGES", ["one-doc", "two-doc"])
    monkeypatch.setattr(corpus, "lxml_html", lambda: None)  # the files are plain text
    return tmp_path


def texts(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def test_the_corpus_ends_where_distinct_documents_end_and_says_so(cache, capsys):
    found = texts(build_corpus(cache, 1))
    assert len(found) == 10
    assert {text.split(" says")[0] for text in found} == {f"line 0 of page {number}" for number in range(10)}
    said = capsys.readouterr().err
    size = sum(len(json.dumps({"text": text})) + 1 for text in found) / 1e6
    assert f"10 distinct documents, {size:.1f} MB; 20 copies left out" in said and "1 MB were asked for" in said


def test_copies_come_only_where_they_are_asked_for_and_beside_the_distinct_corpus(cache, capsys):
    distinct = texts(build_corpus(cache, 1))
    repeated = texts(build_corpus(cache, 1, repeat=True))
    assert repeated[:10] == distinct
    assert repeated[10:30] == [f"Copy {turn}. {text}" for turn in (1, 2) for text in distinct]
    assert 1_000_000 <= sum(len(json.dumps({"text": text})) + 1 for text in repeated) < 1_010_000
    assert "for timing only" in capsys.readouterr().err
    assert texts(build_corpus(cache, 1)) == distinct  # from the cache


def test_writing_stops_at_the_size(cache, capsys):
    write_distinct(cache / "packages", cache / "some.jsonl", 9000)
    found = texts(str(cache / "some.jsonl"))
    assert 1 < len(found) < 10
    assert (
        sum(len(json.dumps({"text": text})) + 1 for text in found[:-1]) < 9000 <= (cache / "some.jsonl").stat().st_size
    )
    assert "asked for" not in capsys.readouterr().err


def test_the_order_depends_on_names_alone(cache, monkeypatch):
    first, listed = texts(build_corpus(cache, 1)), Path.rglob
    (cache / "distinct_1.jsonl").unlink()
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(listed(self, pattern), reverse=True))
    assert texts(build_corpus(cache, 1)) == first
    assert first != sorted(first)  # mixed, not as they are listed


@pytest.mark.parametrize("megabytes", [0, -3])
def test_a_size_below_one_is_refused(tmp_path, megabytes):
    with pytest.raises(UserError, match=f"megabytes={megabytes}"):
        build_corpus(tmp_path, megabytes)


def test_no_packages_is_an_error_and_leaves_no_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PACKAGES", ["no-such-package"])
    monkeypatch.setattr(corpus, "lxml_html", lambda: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="--corpus"):
        build_corpus(tmp_path, 1)
    assert not (tmp_path / "distinct_1.jsonl").exists()


def test_without_lxml_the_program_says_what_to_install_before_it_fetches_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lxml", None)  # an import of it fails, installed or not
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was fetched"))
    assert corpus.main(["--cache", str(tmp_path), "--megabytes", "1"]) == 2
    assert "lxml; `pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.0, True), (0.45, True), (0.55, False), (1.0, False)],
)
def test_a_document_counts_as_a_copy_when_more_than_half_of_its_long_lines_are_known(share, kept):
    new = Distinct()
    assert new(page(1)) and new(page(2))
    old, fresh = page(2).splitlines(), page(3).splitlines()
    known = round(share * len(fresh))
    assert new("\n".join(old[:known] + fresh[known:])) is kept


def test_short_lines_alone_make_no_copy_but_the_same_document_is_one():
    new = Distinct()
    assert new("Name\nSynopsis\nfirst") and new("Name\nSynopsis\nsecond") and not new("Name\nSynopsis\nfirst")


def test_a_document_that_repeats_its_own_lines_is_new():
    assert Distinct()("\n".join([page(1).splitlines()[0]] * 9))


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("handbook/html/de-DE/index.html", True),
        ("linux/html/translations/index.html", True),
        ("handbook/html/en-US/index.html", False),
        ("rust/std/io/index.html", False),
        ("java/jdk.JFR/index.html", False),
    ],
)
def test_translations_are_known_by_their_folder(path, is_one, tmp_path):
    assert translated(tmp_path / path) is is_one


def test_html_becomes_a_line_for_each_block_without_menus_and_scripts():
    pytest.importorskip("lxml")
    text = text_of_html(
        "<html><head><title>Title</title><style>p {}</style><script>run()</script></head><body><nav>menu</nav>"
        "<div><p>naïve <b>text</b></p><ul><li>one</li><li>two</li></ul><pre>a = 1\n  b = 2</pre>tail</div>"
        "<pre class='line-numbers'>1\n2\n</pre><code class='line-numbers'>x = 3</code>"
        "<table><tr><td>left</td><td>right</td></tr></table></body></html>".encode()
    )
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    assert lines == ["Title", "naïve text", "one", "two", "a = 1", "  b = 2", "tail", "x = 3left right"]


@pytest.mark.parametrize("data", [b"", b"   ", b"<!-- only a comment -->"])
def test_html_without_content_gives_no_text(data):
    pytest.importorskip("lxml")
    assert not text_of_html(data).strip()


def test_html_that_is_not_utf8_is_read_as_latin1():
    pytest.importorskip("lxml")
    assert "café" in text_of_html("<p>café</p>".encode("latin-1"))
