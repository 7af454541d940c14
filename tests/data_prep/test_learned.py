"""Templates that mark what is learned: marks, ids, masks and what every subcommand does with a mask."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli
from data_prep.extract import Marked, template_extractor
from data_prep.learned import encode_marked
from megatron_taipan.data.indexed import IndexedReader, IndexedWriter
from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.load import load_tokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = "{context}\nQuestion: {question}\nAnswer:{% generation %} {answer}{% endgeneration %}"
PROMPT = "{context}\nQuestion: {question}\nAnswer:"


def run(*args):
    return cli.main([str(arg) for arg in args])


def documents(prefix):
    reader = IndexedReader(prefix)
    return [reader.document(i).tolist() for i in range(reader.n_documents)]


def rows(speeches, count=60):
    """Made-up questions on real text, with answers of all lengths."""
    draw = random.Random(1)
    out = []
    for i in range(count):
        words = speeches[i % len(speeches)].split()
        at = draw.randrange(len(words) - 60)
        question, answer = " ".join(words[at : at + 7]), " ".join(words[at + 3 : at + 4 + i % 9])
        out.append({"context": " ".join(words[at : at + 50]), "question": question + "?", "answer": answer})
    return out


def write_rows(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


# ---------------------------------------------------------------- marks


@pytest.mark.parametrize(
    ("template", "text", "borders"),
    [
        ("{q}{% generation %} {a}{% endgeneration %}", "Q A", (1,)),
        ("{q}{%generation%} {a}{%  endgeneration  %}", "Q A", (1,)),
        ("{% generation %}{a}{% endgeneration %}", "A", (0,)),
        ("{% generation %}{a}{% endgeneration %}{q}", "AQ", (0, 1)),
        ("{q}{% generation %}{a}{% endgeneration %}.{q}{% generation %}{a}{% endgeneration %}", "QA.QA", (1, 2, 4)),
        ("{q}{% generation %}{a}{% endgeneration %}{% generation %}{a}{% endgeneration %}", "QAA", (1,)),
        ("{q}{e}{% generation %}{e}{% endgeneration %}{% generation %}{a}{% endgeneration %}{e}", "QA", (1,)),
    ],
)
def test_marks(template, text, borders):
    assert template_extractor(template)({"q": "Q", "a": "A", "e": ""}) == Marked(text, borders)


def test_text_that_spells_a_mark_is_text():
    spelled = "{% generation %}"
    assert template_extractor("{q}")({"q": spelled}) == spelled
    assert template_extractor("{{% generation %}}{q}")({"q": "Q"}) == spelled + "Q"
    extract = template_extractor("{q}{% generation %}{a}{% endgeneration %}")
    assert extract({"q": spelled, "a": "A"}) == Marked(spelled + "A", (16,))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{q}{% generation %}{a}", "{% endgeneration %} is missing"),
        ("{q}{% endgeneration %}{a}", "at character 3"),
        ("{% generation %}{q}{% generation %}{a}{% endgeneration %}", "at character 19"),
        ("{q}{% if a %}{a}{% endif %}", "{% if a %} at character 3"),
        ("{% generation %}a{% endgeneration %}", "names no field"),
    ],
)
def test_bad_marks(template, words):
    with pytest.raises(UserError) as caught:
        template_extractor(template)
    assert words in str(caught.value)


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("kind", ["model", "gpt2_like"])
def test_the_ids_of_the_prompt_are_those_that_it_has_alone(kind, request, speeches):
    """And wherever that is possible, those of the whole text: against the libraries called by hand."""
    path = request.getfixturevalue(kind)
    if kind == "model":
        encode = sentencepiece.SentencePieceProcessor(model_file=path).encode
    else:
        import tokenizers

        library = tokenizers.Tokenizer.from_file(path)
        encode = lambda text: library.encode(text).ids  # noqa: E731
    made, cuts, apart = [], [], 0
    for row in rows(speeches):
        prompt = PROMPT.format(**row)
        for p, a in ((prompt, " " + row["answer"]), (prompt + " ", row["answer"]), (prompt + row["answer"], "ation")):
            made.append(p + a)
            cuts.append((len(p),))
    ids, counts, mask, apart = encode_marked(load_tokenizer(path), made, cuts)
    ends = np.cumsum(counts)
    within = 0
    for number, (text, (cut,), end, count) in enumerate(zip(made, cuts, ends, counts, strict=True)):
        mine, marked = ids[end - count : end].tolist(), mask[end - count : end].tolist()
        alone, whole = encode(text[:cut]), encode(text)
        assert mine[: len(alone)] == alone and marked == [0] * len(alone) + [1] * (len(mine) - len(alone))
        if whole[: len(alone)] == alone:
            assert mine == whole
        else:
            within += 1
            assert number % 3  # an answer with its blank begins with a token of its own
    assert within == apart > len(made) / 4


def test_an_answer_apart_has_no_blank_of_its_own(model, gpt2_like):
    """sentencepiece puts a blank before every text; behind another text it may not."""
    for path in (model, gpt2_like):
        tokenizer = load_tokenizer(path)
        for prompt, answer in (("Answer: ", "the people"), ("Answer: ", "of\n1932"), ("The Congr", "ess of 1932")):
            ids, _, mask, apart = encode_marked(tokenizer, [prompt + answer], [(len(prompt),)])
            assert apart == 1 and tokenizer.decode(ids.tolist()) == prompt + answer


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.text(alphabet="ab \nü.", min_size=1, max_size=6), min_size=2, max_size=7))
def test_any_number_of_parts(model, parts):
    """Up to the first border that lies within a token, every border is where the text so far ends."""
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    text = "".join(parts)
    cuts = tuple(len("".join(parts[:k])) for k in range(1, len(parts)))
    ids, counts, mask, apart = encode_marked(load_tokenizer(model), [text], [cuts])
    heads = [library.encode(text[:cut]) for cut in (*cuts, len(text))]
    assert library.decode(ids.tolist()) == text and counts.tolist() == [len(ids)] == [len(mask)]
    assert ids[: len(heads[0])].tolist() == heads[0]
    if all(heads[-1][: len(head)] == head for head in heads):
        expected = [k % 2 for k in range(len(heads)) for _ in range(len(heads[k]) - len(([], *heads)[k]))]
        assert (ids.tolist(), mask.tolist(), apart) == (heads[-1], expected, 0)
    else:
        assert apart == 1


class Lines:
    """A tokenizer of characters but for two newlines in a row, which are one token; it puts a blank before a text."""

    def encode_batch(self, texts):
        found = [[ord(c) for c in " " + text.replace("\n\n", "\r")] for text in texts]
        return np.array([i for ids in found for i in ids], np.uint32), np.array([len(ids) for ids in found], np.int64)


def test_an_answer_that_would_join_what_is_put_before_it_loses_nothing():
    """A newline is put before it, to see how it is tokenized behind other text; here both would become one token."""
    ids, counts, mask, apart = encode_marked(Lines(), ["a\n\nb", "a\n\nb"], [(2,), (1,)])
    assert ids.tolist() == [*b" a\n\nb", *b" a\rb"] and counts.tolist() == [5, 4] and apart == 1
    assert mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1]


# ---------------------------------------------------------------- tokenize


@pytest.fixture(scope="module")
def content(speeches):
    return rows(speeches)


def by_hand(model, content, bos=True, eod=True):
    """Ids and masks of prompt and answer, sentencepiece called by hand."""
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    ids, masks = [], []
    for row in content:
        prompt = library.encode(PROMPT.format(**row))
        whole = library.encode(PROMPT.format(**row) + " " + row["answer"])
        assert whole[: len(prompt)] == prompt
        ids.append([1] * bos + whole + [2] * eod)
        masks.append([0] * bos + [0] * len(prompt) + [1] * (len(whole) - len(prompt)) + [1] * eod)
    return ids, masks


def made(folder, model, content, *more, name="o"):
    source = write_rows(folder / "in.jsonl", content)
    args = ("--input", source, "--tokenizer", model, "--output", folder / name, "--template", TEMPLATE)
    return run("tokenize", *args, "--append-eod", *more)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tokens_and_mask_are_what_the_library_says(tmp_path, model, content, backend, capsys):
    assert made(tmp_path, model, content, "--prepend-bos", "--backend", backend) == 0
    ids, masks = by_hand(model, content)
    assert documents(tmp_path / "o") == ids and documents(tmp_path / "o_loss_mask") == masks
    assert IndexedReader(tmp_path / "o_loss_mask").dtype == np.uint8
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "in.jsonl", "o.bin", "o.idx", "o.json", "o_loss_mask.bin", "o_loss_mask.idx",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "o.json").read_text())
    learned = sum(map(sum, masks))
    assert (manifest["learned"], manifest["apart"]) == (learned, 0)
    assert f"o_loss_mask: {learned} of the tokens are learned" in capsys.readouterr().out


def test_megatron_reads_the_mask(tmp_path, model, content):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    assert made(tmp_path, model, content) == 0
    theirs = indexed.IndexedDataset(str(tmp_path / "o_loss_mask"))
    _, masks = by_hand(model, content, bos=False)
    assert [theirs[i].tolist() for i in range(len(theirs))] == masks


def test_the_end_of_a_document_is_learned_behind_an_answer_only(tmp_path, model):
    source = write_rows(tmp_path / "in.jsonl", [{"q": "one two", "a": "three"}])
    args = ("--input", source, "--tokenizer", model, "--append-eod")
    for number, (template, last) in enumerate(
        (("{q}{% generation %} {a}{% endgeneration %}", 1), ("{q}{% generation %} {a}{% endgeneration %} end", 0))
    ):
        assert run("tokenize", *args, "--template", template, "--output", tmp_path / f"o{number}") == 0
        [mask] = documents(tmp_path / f"o{number}_loss_mask")
        assert mask[-1] == last and sum(mask) - last > 0


def test_shards_have_masks(tmp_path, model, content):
    assert made(tmp_path, model, content, "--shard-tokens", 700) == 0
    manifest = json.loads((tmp_path / "o.json").read_text())
    shards = [tmp_path / shard["prefix"] for shard in manifest["shards"]]
    ids, masks = by_hand(model, content, bos=False)
    assert len(shards) > 3
    assert [d for shard in shards for d in documents(shard)] == ids
    assert [d for shard in shards for d in documents(f"{shard}_loss_mask")] == masks
    assert run("verify", tmp_path / "o") == 0


def test_records_with_nothing_to_learn_give_no_document(tmp_path, model, capsys):
    good = {"context": "c", "question": "q", "answer": "a"}
    source = [good, good | {"answer": ""}, good | {"answer": " \n"}, good]
    assert made(tmp_path, model, source) == 2
    error = capsys.readouterr().err
    assert "nothing to learn" in error and error.count("\n") == 1 and not (tmp_path / "o.idx").exists()
    (tmp_path / "in.txt").write_text("plain text has no fields")
    args = ("--input", tmp_path / "in.txt", tmp_path / "in.jsonl", "--tokenizer", model, "--template", TEMPLATE)
    assert run("tokenize", *args, "--output", tmp_path / "o", "--on-error", "skip") == 0
    reasons = json.loads((tmp_path / "o.json").read_text())["skipped"]["reasons"]
    assert reasons == {"nothing to learn": 2, "document without learned parts": 1}
    assert len(documents(tmp_path / "o")) == len(documents(tmp_path / "o_loss_mask")) == 2


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_document_that_is_too_long_to_be_marked(tmp_path, model, ending, monkeypatch):
    from data_prep.kinds import records

    monkeypatch.setattr(records, "LONG", 2000)
    monkeypatch.setattr("data_prep.long_text.LONG_STRING", 2000)
    content = [{"context": "c " * n, "question": "q", "answer": "a"} for n in (5, 3000)]
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "in.parquet")
    else:
        write_rows(tmp_path / "in.jsonl", content)
    args = ("--input", tmp_path / f"in.{ending}", "--tokenizer", model, "--template", TEMPLATE, "--on-error", "skip")
    assert run("tokenize", *args, "--output", tmp_path / "o") == 0
    assert json.loads((tmp_path / "o.json").read_text())["skipped"]["reasons"] == {"document too long": 1}
    assert len(documents(tmp_path / "o")) == len(documents(tmp_path / "o_loss_mask")) == 1


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name.startswith("o")}


def test_killed_at_any_instant_the_same_command_continues_to_the_same_bytes(tmp_path, model, speeches):
    source = write_rows(tmp_path / "in.jsonl", rows(speeches, 6000))

    def command(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        return [
            sys.executable, "-m", "data_prep", "tokenize", "--input", source, "--tokenizer", model, "--workers", "2",
            "--output", tmp_path / folder / "o", "--append-eod", "--template", TEMPLATE, "--shard-tokens", "200000",
        ]  # fmt: skip

    started = time.monotonic()
    subprocess.run(command("calm"), cwd=ROOT, check=True, capture_output=True)
    calm = time.monotonic() - started
    draw, kills = random.Random(5), 0
    for attempt in range(30):
        process = subprocess.Popen(command("killed"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=calm * (0.25 + draw.random() * min(1, 0.2 * attempt)))
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills > 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "calm")
    assert any(name.endswith("_loss_mask.bin") for name in digests(tmp_path / "calm"))


def test_a_damaged_part_of_a_mask_is_made_again(tmp_path, model, speeches, capsys, monkeypatch):
    class Stopped(Exception):
        pass

    def stopped(*_):
        raise Stopped

    content = rows(speeches, 3000)
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.join.Joiner.finish", stopped)
        with pytest.raises(Stopped):
            made(tmp_path, model, content)
    assert not list(tmp_path.glob("o*.partial")) and not list(tmp_path.glob("o*.idx"))
    parts = sorted((tmp_path / "o.work").glob("*.mask"))
    damaged = bytearray(parts[1].read_bytes())
    damaged[-1] ^= 1
    parts[1].write_bytes(damaged)
    capsys.readouterr()
    args = ("--input", tmp_path / "in.jsonl", "--tokenizer", model, "--output", tmp_path / "o", "--append-eod")
    assert run("tokenize", *args, "--template", TEMPLATE) == 0
    assert f"continuing: {len(parts) - 1} of {len(parts)} parts" in capsys.readouterr().out
    assert documents(tmp_path / "o_loss_mask") == by_hand(model, content, bos=False)[1]


def test_no_mask_outlives_its_tokens(tmp_path, model, content):
    """Tokens without a mask where masked ones stood, and the other way round."""
    source = write_rows(tmp_path / "in.jsonl", content)
    plain = ("--input", source, "--tokenizer", model, "--output", tmp_path / "o", "--template", PROMPT, "--overwrite")
    assert made(tmp_path, model, content) == 0
    assert run("tokenize", *plain) == 0
    assert not list(tmp_path.glob("o_loss_mask*"))
    assert made(tmp_path, model, content, "--overwrite") == 0
    assert documents(tmp_path / "o_loss_mask") == by_hand(model, content, bos=False)[1]
    (tmp_path / "o_loss_mask.bin").unlink()  # then the output is not complete
    args = ("--input", source, "--tokenizer", model, "--output", tmp_path / "o", "--template", TEMPLATE)
    assert run("tokenize", *args, "--append-eod") == 0
    assert run("verify", tmp_path / "o") == 0


def test_the_name_of_a_mask_is_refused(tmp_path, model, content, capsys):
    assert made(tmp_path, model, content, name="x_loss_mask") == 2
    assert "names that end in _loss_mask" in capsys.readouterr().err


# ---------------------------------------------------------------- the other subcommands

TOY = [([5, 6, 7], [0, 0, 1]), ([8], [1]), ([5, 6, 7], [0, 1, 1]), ([5, 6, 7], [0, 0, 1]), ([9, 9], [0, 1]), ([8], [1])]


def pair(prefix, content, masked=True):
    for path, part, dtype in ((prefix, 0, np.uint16), (f"{prefix}_loss_mask", 1, np.uint8))[: 1 + masked]:
        with IndexedWriter(path, dtype) as writer:
            for document in content:
                writer.add_document(document[part])
    return str(prefix)


def both(prefix):
    return list(zip(documents(prefix), documents(f"{prefix}_loss_mask"), strict=True))


def test_merge_carries_masks(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    pair(tmp_path / "in/p_2", TOY[:2])
    pair(tmp_path / "in/p_10", TOY[2:])
    for several in (tmp_path / "in", tmp_path / "in/p_*"):
        assert run("merge", several, "--output", tmp_path / "all", "--overwrite") == 0
        assert both(tmp_path / "all") == TOY
    assert "6 documents, 13 tokens from 2 pairs" in capsys.readouterr().out
    plain = pair(tmp_path / "plain", TOY, masked=False)
    before = sorted(os.listdir(tmp_path))
    assert run("merge", plain, tmp_path / "in/p_2", "--output", tmp_path / "new") == 2
    assert "has a loss mask and the other none" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before
    assert run("merge", plain, "--output", tmp_path / "all", "--overwrite") == 0
    assert not list(tmp_path.glob("all_loss_mask*"))


def test_split_carries_masks(tmp_path):
    from megatron_taipan.data.split import held_out_documents

    prefix = pair(tmp_path / "x", TOY)
    assert run("split", prefix, "--output", tmp_path / "s", "--shard-tokens", 4) == 0
    assert [d for k in range(4) for d in both(tmp_path / f"s-{k:05d}")] == TOY
    assert run("split", prefix, "--output", tmp_path / "v", "--valid-fraction", 0.34) == 0
    held = held_out_documents(IndexedReader(prefix), 0.34).tolist()
    assert both(tmp_path / "v-valid") == [TOY[k] for k in held]
    assert both(tmp_path / "v-train") == [TOY[k] for k in range(6) if k not in held]


def test_dedup_keeps_what_differs_in_the_mask_alone(tmp_path):
    assert run("dedup", pair(tmp_path / "x", TOY), "--output", tmp_path / "y") == 0
    assert both(tmp_path / "y") == [TOY[0], TOY[1], TOY[2], TOY[4]]


@pytest.mark.parametrize("command", [("merge",), ("dedup",), ("split", "--shard-tokens", 99)])
@pytest.mark.parametrize("index", [1, 2])
def test_a_full_disk_leaves_neither_tokens_nor_mask(tmp_path, monkeypatch, command, index):
    from data_prep import shards

    real, written = shards.write_index, []

    def write_until_full(path, *rest):
        written.append(path)
        if len(written) == index:
            raise OSError(28, "No space left on device", path)
        real(path, *rest)

    prefix = pair(tmp_path / "x", TOY)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(shards, "write_index", write_until_full)
    assert run(*command, prefix, "--output", tmp_path / "out") == 2
    assert sorted(os.listdir(tmp_path)) == before


def other_mask(tmp_path, masks):
    with IndexedWriter(tmp_path / "x_loss_mask", np.uint8) as writer:
        for mask in masks:
            writer.add_document(mask)


@pytest.mark.parametrize("command", [("verify",), ("stats",), ("inspect",), ("merge",), ("dedup",)])
def test_another_pair_s_mask_is_refused_with_the_numbers(tmp_path, capsys, command):
    prefix = pair(tmp_path / "x", TOY)
    more = ("--output", tmp_path / "o") if command[0] in ("merge", "dedup") else ()
    for masks, words in (
        ([mask for _, mask in TOY[:-1]], "5 documents and"),
        ([mask for _, mask in TOY[:-1]] + [[1, 1]], "14 tokens and"),
        ([[0, 1], [1, 1], *(mask for _, mask in TOY[2:])], "document 0 has 2 tokens and that of"),
    ):
        other_mask(tmp_path, masks)
        assert run(*command, prefix, *more) == 2
        assert words in capsys.readouterr().err


def test_verify_reads_the_mask(tmp_path, model, content, capsys):
    assert made(tmp_path, model, content) == 0
    learned = sum(map(sum, by_hand(model, content, bos=False)[1]))
    capsys.readouterr()
    assert run("verify", tmp_path / "o") == 0
    out = capsys.readouterr().out
    assert "counts, ends of documents, loss mask" in out and f"{learned} of " in out
    mask = tmp_path / "o_loss_mask.bin"
    whole = mask.read_bytes()
    mask.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert run("verify", tmp_path / "o") == 2 and "o_loss_mask.bin has checksum" in capsys.readouterr().err
    mask.unlink()
    assert run("verify", tmp_path / "o") == 2 and "does not exist" in capsys.readouterr().err
    (tmp_path / "o_loss_mask.idx").unlink()
    assert run("verify", tmp_path / "o") == 2 and "its manifest names it" in capsys.readouterr().err
    pair(tmp_path / "x", TOY)
    other_mask(tmp_path, [[2] * len(mask) for _, mask in TOY])
    assert run("verify", tmp_path / "x") == 2
    assert "holds 2, and a loss mask holds only 0 and 1" in capsys.readouterr().err


def test_stats_and_inspect_say_what_is_learned(tmp_path, model, content, capsys):
    pair(tmp_path / "x", TOY)
    assert run("stats", tmp_path / "x") == 0
    assert "loss mask: 7 tokens are learned, 53.85 %" in capsys.readouterr().out
    assert run("inspect", tmp_path / "x", "--documents", 9) == 0
    out = capsys.readouterr().out
    assert "document 2, 3 tokens, 2 learned\n  5 \u27e66 7\u27e7\n" in out and "\n  \u27e68\u27e7\n" in out
    assert made(tmp_path, model, content) == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "o", "--tokenizer", model, "--full", "--first", 3, "--documents", 1) == 0
    row = content[3]
    shown = f"{PROMPT.format(**row)}\u27e6 {row['answer']}</s>\u27e7".replace("\n", "\\n")
    assert f"\n  {shown}\n" in capsys.readouterr().out
