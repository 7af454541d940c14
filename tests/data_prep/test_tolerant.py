"""A record is lost for its text's own fault alone."""

import json
import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import cli, long_text, readers, stream_cache, tolerant
from data_prep.extract import field_extractor, template_extractor
from data_prep.kinds import records
from data_prep.kinds.records import Slice
from megatron_taipan.data.indexed import IndexedReader

BESIDE = [  # of a field that is not asked for
    b"NaN",
    b"-Infinity",
    b"1e400",
    b"[1, {\"x\": Infinity}]",
    b"9" * 5000,
    rb'"\ud800"',
    rb'"\udc00 and \ud83d"',
    b'"\xff\xfe"',
    b'"caf\xe9"',
    b'"tab\there"',
    b'"nul\x00, bell\x07"',
]  # fmt: skip
OF_THE_TEXT = [
    (rb'"ab\ud800"', "invalid UTF-8: lone surrogate at character 2 of the text"),
    (b'"ab\xff"', r"invalid UTF-8: byte \xff at character 2 of the text"),
    (b'"ab\x00"', r"broken JSON: control character \x00 at character 2 of the text"),
    (b"NaN", "field 'text' is not a text but a float"),
    (b'"ab', "broken JSON: Unterminated string"),
    (b'"ab\\x"', "broken JSON: Invalid \\escape"),
    (b"nan", "broken JSON: Expecting value"),
    (b"[" * 90_000 + b"]" * 90_000, "broken JSON: too deeply nested"),
]


def read(path, extract):
    """(text, problem) of every record, read as short lines, and as long ones."""
    found = []
    for small in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if small:
                patch.setattr(records, "LONG", 16)
                patch.setattr(long_text, "LONG_STRING", 6)
                patch.setattr(long_text, "READ_BYTES", 8)
            taken = readers.read_records(Slice(str(path), 0, path.stat().st_size), extract)
            found.append([("".join(r.chunks) if r.chunks is not None else r.text, r.problem) for r in taken])
    assert [text for text, _ in found[0]] == [text for text, _ in found[1]]
    return found


@pytest.mark.parametrize("value", BESIDE, ids=lambda value: str(value)[:20])
def test_a_fault_beside_the_text_costs_no_document(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"x": %s, "text": "\xc3\xa9\\u00e9\\ud83d\\ude00 and more"}\n{"text": "b", "x": %s}' % (value, value)
    )
    for found in read(path, field_extractor("text")):
        assert found == [("\u00e9\u00e9\U0001f600 and more", ""), ("b", "")]


@pytest.mark.parametrize(("value", "problem"), OF_THE_TEXT, ids=lambda value: str(value)[:20])
def test_a_fault_of_the_text_is_named(tmp_path, value, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"x": NaN, "text": ' + value + b'}\n{"text": "b"}')
    short, long = read(path, field_extractor("text"))
    assert short[1:] == long[1:] == [("b", "")]
    assert short[0][1].startswith(problem) and long[0][1].partition(":")[0] == problem.partition(":")[0]
    if "at character" in problem:
        assert short == long


def test_a_number_that_is_none_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"score": NaN, "text": "a"}\n{"score": 2.5, "text": "a"}\n')
    for found in read(path, template_extractor("{text} {score}")):
        assert found == [("", "field 'score' is not a number but nan"), ("a 2.5", "")]


def test_on_the_command_line(tmp_path, model):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one", "score": NaN}\n{"text": "two", "title": "\\ud800"}\n{"text": "three"}\n')
    assert cli.main(["tokenize", "--input", str(path), "--tokenizer", model, "--output", str(tmp_path / "o")]) == 0
    assert IndexedReader(tmp_path / "o").n_documents == 3


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()), st.lists))
def test_whatever_python_writes_is_read(value):
    def same(a, b):
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, int) and isinstance(b, float):  # orjson's way with whole numbers beyond 64 bits
            return abs(a) >= 2**63 and float(a) == b
        return a == b or isinstance(a, float) and math.isnan(a) and math.isnan(b)

    assert same(value, tolerant.loads(json.dumps(value).encode()))


def test_a_hub_record_is_written_whatever_it_holds():
    record = {"text": "a", "title": "\ud800", "n": 2**70, 3: "x"}
    assert tolerant.loads(stream_cache._packed(record)) == {"text": "a", "title": "\ud800", "n": 2**70, "3": "x"}
    packed = stream_cache._packed({"text": "\u00e9", "score": math.nan})
    assert orjson.loads(packed) == {
        "text": "\u00e9",
        "score": None,
    }
