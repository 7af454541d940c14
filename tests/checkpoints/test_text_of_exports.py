"""What an exported tokenizer does in transformers' hands: special tokens, what it puts around a text, pipelines, chats.

Compared with sentencepiece, with the data that `data_prep` writes, and with conversations written by hand.
"""

import json

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, pipeline

from checkpoints.chat_template import SAMPLE, read_template
from checkpoints.document_ends import DocumentEnds, document_ends
from checkpoints.tokenizer import begin_with, write_tokenizer
from data_prep import cli
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError
from megatron_taipan.hf import TaipanConfig, TaipanForCausalLM
from tests.checkpoints.made import lines_of_text, train_sentencepiece
from tests.inference.networks import small_config


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("spm"))


def tokenize(place, name: str, model_file, *options: str, lines=None) -> str:
    """The prefix of data that the preprocessing program makes of some lines of text, one document each."""
    lines = lines or [line for line in lines_of_text() if line.strip()][:40]
    (place / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prefix = place / name
    command = ["tokenize", "--input", f"{prefix}.jsonl", "--tokenizer", str(model_file), "--output", str(prefix)]
    assert cli.main([*command, "--workers", "1", "--backend", "reference", *options]) == 0
    return str(prefix)


def data_of(*prefixes: str) -> DataConfig:
    return DataConfig.model_validate({"train": list(prefixes), "seq_len": 64})


@pytest.mark.parametrize("options", [(), ("--append-eod",), ("--prepend-bos", "--append-eod")])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_text_gets_the_ids_that_it_has_in_the_data(tmp_path, model_file, options, manifest):
    """With and without PREFIX.json; but for the end of the document, which is not there yet when a text begins."""
    prefix = tokenize(tmp_path, "data", model_file, *options)
    if not manifest:
        (tmp_path / "data.json").unlink()
    special = write_tokenizer(model_file, tmp_path / "out", [], 128, data=data_of(prefix))
    tokenizer, reader = AutoTokenizer.from_pretrained(tmp_path / "out"), IndexedReader(prefix)
    texts = [json.loads(line)["text"] for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    end = [tokenizer.eos_token_id] if "--append-eod" in options else []
    for index, text in enumerate(texts):
        assert tokenizer(text)["input_ids"] + end == reader.document(index).tolist()
    begins = "--prepend-bos" in options
    said = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (said["add_bos_token"], said["add_eos_token"]) == (begins, False)
    assert tokenizer.bos_token == ("<s>" if begins else None)
    assert special.settings.get("bos_token_id") == (1 if begins else None)
    assert tokenizer.eos_token_id == 2
    assert special.ends == DocumentEnds(1 if begins else None, 2 if end else None)


def test_what_stood_around_documents_is_found_for_shards_merged_and_mixed_data(tmp_path, model_file):
    both = tokenize(tmp_path, "both", model_file, "--prepend-bos", "--append-eod", "--shard-tokens", "100")
    shards = sorted(str(path.with_suffix("")) for path in tmp_path.glob("both*.idx"))
    assert len(shards) > 1 and both not in shards
    end = tokenize(tmp_path, "end", model_file, "--append-eod")
    assert document_ends(data_of(*shards), 1, 2) == DocumentEnds(1, 2)
    for file in tmp_path.glob("both*.bin"):
        file.unlink()
    assert document_ends(data_of(*shards), None, None) == DocumentEnds(1, 2)  # by the manifest alone
    assert document_ends(data_of(shards[0], end), 1, 2) == DocumentEnds(None, 2)
    assert document_ends(data_of(end, str(tmp_path / "gone")), 1, 2) is None
    (tmp_path / "end.json").write_text('{"format": "another program\'s"}')
    assert document_ends(data_of(end), 1, 2) == DocumentEnds(None, 2)
    assert document_ends(data_of(end), 1, 700) == DocumentEnds(None, None)


def test_data_of_another_tokenizer_is_refused(tmp_path, model_file):
    prefix = tokenize(tmp_path, "data", model_file, "--append-eod", "--eod-token", "self")
    (tmp_path / "small").mkdir()
    small = train_sentencepiece(tmp_path / "small", vocab_size=360)
    with pytest.raises(UserError, match=r"have id \d+ at their ends, which .*tok.model with its 360 tokens does not"):
        write_tokenizer(small, tmp_path / "out", [], 128, data=data_of(prefix))
    special = write_tokenizer(model_file, tmp_path / "out", [], 128, data=data_of(prefix))
    assert special.tokens["eos_token"] == "self"  # what the documents end with, whatever the tokenizer calls its own


def test_special_tokens_are_parsed_unless_told_otherwise(tmp_path, model_file):
    write_tokenizer(model_file, tmp_path, [], 128)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("def f(x):</s>")["input_ids"] == [*reference.encode("def f(x):"), reference.eos_id()]
    assert tokenizer("</s>")["input_ids"] == [reference.eos_id()]
    kept = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    wanted = reference.encode("def f(x):</s>")
    assert tokenizer("def f(x):</s>", split_special_tokens=True)["input_ids"] == wanted
    assert kept("def f(x):</s>")["input_ids"] == wanted and reference.eos_id() not in wanted


def test_a_file_that_puts_tokens_around_a_text_does_what_the_data_did(tmp_path, model_file):
    """A tokenizer.json of elsewhere often has a template with BOS."""
    write_tokenizer(model_file, tmp_path / "first", [], 128)
    from tokenizers import Tokenizer

    source = Tokenizer.from_file(str(tmp_path / "first/tokenizer.json"))
    begin_with(source, "<s>")
    source.save(str(tmp_path / "tokenizer.json"))
    assert source.encode("a").ids[0] == 1
    plain = source.encode("a", add_special_tokens=False).ids
    write_tokenizer(tmp_path / "tokenizer.json", tmp_path / "out", [], 128)
    assert Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("a").ids == plain
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"] == plain


@pytest.mark.parametrize("prompt", ["def __init__(self", "return None", " import", "x"])
def test_a_pipelines_text_is_that_of_all_ids(tmp_path, model_file, prompt):
    write_tokenizer(model_file, tmp_path, [], 128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    network = small_config("M S", vocab_size=600).model_dump(mode="json")
    model = TaipanForCausalLM(TaipanConfig(network=network, eos_token_id=2, pad_token_id=2)).eval()
    words = [i for i in range(600) if reference.id_to_piece(i).startswith("\u2581") and reference.decode([i]).strip()]
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    banned = [[i] for i in range(600) if i not in words]  # every token begins a word: spaces must stand before each
    long = {"max_new_tokens": 6, "min_new_tokens": 6}  # transformers takes the end out of banned words
    written = generate(prompt, **long, do_sample=False, bad_words_ids=banned, return_full_text=True)
    ids = generate(prompt, **long, do_sample=False, bad_words_ids=banned, return_tensors=True)
    new = ids[0]["generated_token_ids"][len(reference.encode(prompt)) :]
    assert len(new) == 6 and set(new) <= set(words)
    assert written[0]["generated_text"] == reference.decode([*reference.encode(prompt), *new])
    assert written[0]["generated_text"][len(prompt)] == " "


TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def test_a_chat_template_works_from_the_folder(tmp_path, model_file):
    special = write_tokenizer(model_file, tmp_path, [], 128)
    (tmp_path / "given").write_text(TEMPLATE)
    template, rendered = read_template(tmp_path / "given", special.tokens)
    (tmp_path / "chat_template.jinja").write_text(template)
    by_hand = "".join(f"{message['role']}: {message['content']}</s>\n" for message in SAMPLE) + "assistant:"
    assert rendered == by_hand
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template(SAMPLE, tokenize=False, add_generation_prompt=True) == by_hand
    ids = tokenizer.apply_chat_template(SAMPLE, add_generation_prompt=True, return_dict=False)
    assert ids.count(2) == 3  # the ends of the messages are tokens, not their spelling
    assert torch.equal(torch.tensor(ids), torch.tensor(tokenizer(by_hand)["input_ids"]))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% for m in messages %}", "is not valid jinja: line 2: .*"),
        ("{{ raise_exception('no system') }}", "fails on a conversation of user, assistant, user: no system"),
        ("{{ messages[7].content }}", "fails on a conversation"),
        ("{{ messages | sum }}", "fails on a conversation"),
        ("{{ messages[0].content }}", "leaves out 2 of the 3 messages .*first 'Eight of them.'"),
        ("no conversation", "leaves out 3 of the 3 messages"),
    ],
)
def test_a_template_that_does_not_work_is_refused(tmp_path, template, message):
    (tmp_path / "given.jinja").write_text(template)
    with pytest.raises(UserError, match=message):
        read_template(tmp_path / "given.jinja", {"eos_token": "</s>"})


def test_a_template_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "binary"):
        with pytest.raises(UserError, match="cannot be read"):
            read_template(tmp_path / name, {})
