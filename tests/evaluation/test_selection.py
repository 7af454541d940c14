"""What is said to be selected is what one pass without a cache selects; table, page and program tell it rightly."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from checkpoints.tokenizer import convert_sentencepiece
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.gate_decisions import GateDecisions, collect_decisions
from megatron_taipan.evaluation.selection import group_tokens, main, truncate_tokens
from megatron_taipan.evaluation.selection_page import make_page
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.tokenizer.hard_texts import hostile_texts
from megatron_taipan.tokenizer.load import load_tokenizer_file
from tests.checkpoint.test_weights import write_weights
from tests.checkpoints.made import memory_state, train_sentencepiece, write_checkpoint
from tests.inference.networks import VOCABULARY, small_config, small_model

TEXT = 'class Gate:\n    def __init__(self, Gate, x2=0.15):\n\treturn “naïve” 漢 x2 Gate  # < & > "q" \'\r\n\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("selection"))


def move_thresholds(model: Taipan, ids: list[int], shares: list[float]) -> None:
    """Thresholds at which the S layers select about these shares of a text."""
    gates = [layer.gate for layer in model.layers if layer.kind.gated]
    for gate, share in zip(gates, shares, strict=True):
        margins = []
        hook = gate.register_forward_hook(lambda _, __, s, into=margins: into.append(s.margin))
        with torch.no_grad():
            model(torch.tensor([ids]))
        hook.remove()
        gate.threshold.copy_(margins[0].flatten().quantile(1 - share))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_choices_are_those_of_one_pass_without_a_cache(chunk):
    """The gates' inputs are caught on their way in; alpha and the margin are worked out from the weights here."""
    model = small_model("M S W S")
    ids = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    move_thresholds(model, ids, [0.3, 0.6])
    wanted_alpha, wanted_selected = [], []
    for gate in (model.layers[1].gate, model.layers[3].gate):
        inputs = []
        hook = gate.register_forward_pre_hook(lambda _, given, into=inputs: into.append(given[0]))
        with torch.no_grad():
            model(torch.tensor([ids]))
        hook.remove()
        logits = inputs[0][0] @ gate.weight.T + gate.bias  # [l, 2]
        wanted_alpha.append(torch.sigmoid(logits[:, 1] - logits[:, 0]))
        wanted_selected.append(logits[:, 1] - logits[:, 0] > gate.threshold)
    lengths = []
    hook = model.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    decisions = collect_decisions(model.train(), ids, chunk)
    hook.remove()
    assert sum(lengths) == 40 and max(lengths) == min(chunk, 40)
    assert decisions.layers == [1, 3] and model.training
    assert not model.layers[1].gate._forward_hooks
    torch.testing.assert_close(decisions.alpha, torch.stack(wanted_alpha))
    assert torch.equal(decisions.selected, torch.stack(wanted_selected))
    assert 8 <= decisions.selected[0].sum() <= 16 and 20 <= decisions.selected[1].sum() <= 28


@pytest.mark.parametrize(
    ("pattern", "ids", "words"),
    [("M W", [1], "no S layer"), ("M S", [], "0 tokens"), ("M S", [3, VOCABULARY], f"gives id {VOCABULARY}")],
)
def test_what_has_no_choices_is_refused(pattern, ids, words):
    with pytest.raises(UserError, match=words):
        collect_decisions(small_model(pattern), ids)


def test_groups_are_counted_by_hand():
    l = 600
    selected = torch.zeros(2, l, dtype=torch.bool)
    selected[0, :64] = True  # all of the first 64
    selected[1, [0, 70, 599]] = True
    of_kind = {"odd": [i % 2 == 1 for i in range(l)], "none": [False] * l}
    found = {g.name: g[1:] for g in group_tokens(GateDecisions([2, 5], selected, selected.float()), of_kind)}
    assert found["all"] == (600, pytest.approx(67 / 1200), pytest.approx([64 / 600, 3 / 600]))
    assert found["position 0 to 63"] == (64, pytest.approx(65 / 128), pytest.approx([1, 1 / 64]))
    assert found["position 64 to 511"] == (448, pytest.approx(1 / 896), pytest.approx([0, 1 / 448]))
    assert found["position 512 to 2,047"] == (88, pytest.approx(1 / 176), pytest.approx([0, 1 / 88]))
    assert found["position 2,048 and beyond"] == found["none"] == (0, None, [None, None])
    assert found["odd"] == (300, pytest.approx(33 / 600), pytest.approx([32 / 300, 1 / 300]))


def test_a_character_is_read_to_its_end():
    parts = [b"a", b" \xe2", b"\x82", b"\xac", b"b"]
    assert [len(truncate_tokens(parts, most)) for most in (1, 2, 3, 4, 5, 9)] == [1, 4, 4, 4, 5, 5]


class Page(HTMLParser):
    """The text within id="text", and of every token its class, hint, text, and what a reader sees."""

    def __init__(self, content: str):
        super().__init__()
        self.inside, self.text, self.tokens, self.asked = False, "", [], []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.asked += [given[name] for name in ("src", "href") if name in given] + ([tag] if tag == "script" else [])
        if tag == "div" and given.get("id") == "text":
            self.inside = True
        elif self.inside and tag == "span":
            self.tokens.append({"class": given["class"], "hint": given["title"], "text": "", "signs": []})
        elif self.inside and tag == "i":
            self.tokens[-1]["signs"].append(given["data-sign"])

    def handle_data(self, data):
        if self.inside:
            self.text += data
            self.tokens[-1]["text"] += data

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "div"


SUMMARY = {"model": "a<b>&amp;", "pattern": "M S", "text": "t", "tokens": 3, "text_tokens": 3}


def page_of(ids: list[int], parts: list[bytes], layers: int = 3) -> tuple[Page, GateDecisions, str]:
    """A page of random decisions."""
    draw = torch.Generator().manual_seed(0)
    alpha = torch.rand(layers, len(ids), generator=draw)
    decisions = GateDecisions(list(range(1, 2 * layers, 2)), torch.rand(alpha.shape, generator=draw) > 0.5, alpha)
    content = make_page(SUMMARY, ids, parts, decisions, [["tokens", "count"], ["<all>", "3"]])
    return Page(content), decisions, content


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_the_page_holds_the_text_and_only_the_text(tokenizer, tmp_path, kind):
    if kind == "json":
        convert_sentencepiece(tokenizer).save(str(tmp_path / "tokenizer.json"))
    codec = load_tokenizer_file(tokenizer if kind == "sentencepiece" else tmp_path / "tokenizer.json")
    for text in [TEXT, *(text for text in hostile_texts() if text)]:
        page, _, _ = page_of(*codec.encode_with_bytes(text))
        assert page.text == text.replace("\0", "\ufffd")
        assert page.asked == []


def test_shades_and_hints_are_the_choices(tokenizer):
    ids, parts = load_tokenizer_file(tokenizer).encode_with_bytes(TEXT)
    page, decisions, content = page_of(ids, parts)
    assert len(page.tokens) == len(ids)
    for i, token in enumerate(page.tokens):
        by = [decisions.selected[layer, i].item() for layer in range(3)]
        assert token["class"] == f"k{by.count(True)}"
        lines = [f"layer {2 * n + 1} {'●' if m else '○'} {decisions.alpha[n, i].item():.3f}" for n, m in enumerate(by)]
        assert token["hint"].split("\n") == [f"token {i}, id {ids[i]}", *lines]
    assert "a&lt;b&gt;&amp;amp;" in content and "<b>" not in content and "&lt;all&gt;" in content
    for k in range(4):
        total = sum(token["class"] == f"k{k}" for token in page.tokens)
        assert f'class="k{k}">{k} of 3: {total:,} tokens<' in content and f".k{k} {{ background" in content


def test_signs_stand_for_what_has_no_shape():
    parts = [b"", b"a ", b"  ", b"\n\t", b" b;\r\n", b"\xe2", b"\x82", b"\xac", b" \xe2\x80", b"\x9cq\xc3", b"\xa9\x07"]
    parts += [b"\t.", b"<b>&lt;", b"\xe3\x80\x80"]
    page, _, _ = page_of(list(range(len(parts))), parts)
    assert [(token["text"], " ".join(token["signs"])) for token in page.tokens] == [
        ("", "∅"), ("a ", ""), ("  ", "· ·"), ("\n\t", "↵ →"), (" b;\r\n", "← ↵"), ("", "<0xE2>"), ("", "<0x82>"),
        ("€", "<0xAC>"), (" ", "· <0xE2> <0x80>"), ("“q", "<0x9C> <0xC3>"), ("é\x07", "<0xA9> <0x07>"), ("\t.", ""),
        ("<b>&lt;", ""), ("\u3000", "␣"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """The same weights exported and as a checkpoint, of a network that selects some tokens of TEXT."""
    folder = tmp_path_factory.mktemp("folders")
    state = memory_state("M S W S", vocab_size=600, gate={"threshold": 0.1})
    model = Taipan(state.config.model)
    model.load_state_dict(state.weights)
    for layer in (1, 3):
        model.layers[layer].gate.threshold.fill_(0.1)
    write_checkpoint(folder / "run", state.config, state.load)
    return write_weights(folder / "weights", model), folder / "run", model.eval()


@pytest.mark.parametrize("form", ["exported", "checkpoint"])
def test_the_program_end_to_end(folders, tokenizer, tmp_path, capsys, form):
    (tmp_path / "text.txt").write_bytes((TEXT * 3).encode())
    place, out, figures = folders[form == "checkpoint"], tmp_path / "page.html", tmp_path / "figures.json"
    arguments = [str(place), "--text", str(tmp_path / "text.txt"), "--tokenizer", str(tokenizer), "--chunk", "50"]
    assert main([*arguments, "--out", str(out), "--json", str(figures), "--device", "cpu"]) == 0
    ids, _ = load_tokenizer_file(tokenizer).encode_with_bytes(TEXT * 3)
    wanted = collect_decisions(folders[2], ids)
    assert 0 < wanted.selected.float().mean() < 1
    page = Page(out.read_bytes().decode())
    assert page.text == TEXT * 3
    assert [token["class"] for token in page.tokens] == [f"k{k}" for k in wanted.selected.sum(0).tolist()]

    said = json.loads(figures.read_text(encoding="utf-8"))
    assert said["tokens"] == len(ids) and said["layers"] == [1, 3]
    assert said["groups"][0]["shares"] == pytest.approx(wanted.selected.double().mean(1).tolist())
    assert sum(said["tokens_by_layers"]) == len(ids)
    counts = {g["name"]: g["tokens"] for g in said["groups"]}
    kinds = ("first piece of a word", "continuation of a word", "number", "punctuation or symbol", "white space")
    assert sum(counts[kind] for kind in kinds) == len(ids) and counts["name, repeated"] > 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + len(said["groups"])
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "all",
        f"{len(ids)}",
        *(f"{share:.1%}" for share in (said["groups"][0]["mean"], *said["groups"][0]["shares"])),
    ]


def test_a_long_text_is_read_in_part(folders, tokenizer, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT, newline="")
    arguments = [str(folders[0]), "--text", str(tmp_path / "text.txt"), "--tokenizer", str(tokenizer)]
    assert main([*arguments, "--max-tokens", "5", "--out", str(tmp_path / "page.html")]) == 0
    total = len(load_tokenizer_file(tokenizer).encode(TEXT))
    assert f"reads 5 of the {total} tokens" in capsys.readouterr().out
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(page.tokens) == 5 and page.text and TEXT.startswith(page.text)


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (None, [], "cannot read a text"),
        (b"", [], "is empty"),
        (b"\xff\xfe", [], "cannot read a text"),
        (b"x", ["--max-tokens", "0"], "--max-tokens=0"),
        (b"x", [], "names no tokenizer"),
        (b"x", ["--tokenizer", "TOKENIZER", "--out", "no/such/folder/page.html"], "was not written"),
    ],
)
def test_mistakes_are_one_line(folders, tokenizer, tmp_path, capsys, content, arguments, words):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    arguments = [str(tokenizer) if word == "TOKENIZER" else word for word in arguments]
    assert main([str(folders[0]), "--text", str(tmp_path / "text.txt"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and re.fullmatch(r"error: [^\n]+\n", error)


def test_a_text_of_no_tokens_and_a_model_without_gates_are_refused(folders, tmp_path, capsys):
    (tmp_path / "blanks.txt").write_text("   ")
    dropping = train_sentencepiece(tmp_path, remove_extra_whitespaces=True)
    plain = write_weights(tmp_path / "plain", Taipan(small_config("M W", vocab_size=600)))
    shared = ["--text", str(tmp_path / "blanks.txt"), "--tokenizer", str(dropping)]
    assert main([str(folders[0]), *shared]) == 2 and "0 tokens" in capsys.readouterr().err
    assert main([str(plain), *shared]) == 2 and "no S layer" in capsys.readouterr().err
