"""An HTML page that shows which tokens of a text are selected. It needs no other file, no network and no script."""

import codecs
import unicodedata
from html import escape

from megatron_taipan.evaluation.gate_decisions import GateDecisions

SIGNS = {" ": "·", "\t": "→", "\n": "↵", "\r": "←"}  # for white space that should be visible
OTHER_BLANK = "␣"
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --faint: #6b6b6b; --line: #d8d8d8; --shade: 255 150 0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #17181a; --ink: #ececec; --faint: #9b9b9b; --line: #3a3b3e; --shade: 214 96 0; }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; }
p { overflow-wrap: anywhere; }
.faint { color: var(--faint); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.scroll { overflow-x: auto; }
.legend span { display: inline-block; margin: 0 .5rem .3rem 0; padding: .1rem .5rem; border: 1px solid var(--line);
  border-radius: .2rem; font-size: .9rem; }
#text { border-top: 1px solid var(--line); padding-top: 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  tab-size: 4; font: .95rem/1.7 ui-monospace, Menlo, Consolas, monospace; }
#text span { border-radius: .15rem; padding: .1rem 0; -webkit-box-decoration-break: clone; box-decoration-break: clone;
  box-shadow: inset -1px 0 var(--page); }
#text span:hover { outline: 1px solid var(--ink); }
#text i { font-style: normal; font-size: 0; unicode-bidi: isolate; }
#text i::before { content: attr(data-sign); font-size: .85rem; color: var(--faint); }
"""


def make_page(
    summary: dict, ids: list[int], parts: list[bytes], decisions: GateDecisions, table: list[list[str]]
) -> str:
    """The whole file.

    Args:
        summary: "model", "pattern", "text", "tokens" and "text_tokens", shown at the top.
        parts: the bytes of each token. The text within `id="text"` is the concatenated parts, character by character,
            except for NUL, which HTML cannot hold and U+FFFD replaces. A character that several tokens share is text of
            the last one.
        table: cells, the header first.
    """
    s = len(decisions.layers)
    counts = decisions.selected.sum(0)  # [l] layers that select each token
    # the square root, because most tokens are selected by few of many layers
    strengths = [0.85 * (k / s) ** 0.5 for k in range(s + 1)]
    shades = "".join(f".k{k} {{ background: rgb(var(--shade) / {a:.3f}); }}\n" for k, a in enumerate(strengths))
    totals = counts.bincount(minlength=s + 1).tolist()
    legend = "\n".join(f'<span class="k{k}">{k} of {s}: {total:,} tokens</span>' for k, total in enumerate(totals))
    blank, tab, feed, back = SIGNS.values()
    header, *rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table]
    body = "".join(
        f'<span class="k{k}" title="{escape(hint)}">{shown}</span>'
        for k, hint, shown in zip(counts.tolist(), _hints(ids, decisions), _shown(parts), strict=True)
    )
    part = "" if summary["tokens"] == summary["text_tokens"] else f" of {summary['text_tokens']:,}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which tokens are selected: {escape(summary["model"])}</title>
<style>{STYLE}{shades}</style>
</head>
<body>
<h1>Which tokens are selected</h1>
<p>Model {escape(summary["model"])}<br>
<span class="faint">Pattern {escape(summary["pattern"])}, of which {s} S layers have a gate</span><br>
Text {escape(summary["text"])}, {summary["tokens"]:,}{part} tokens<br>
{counts.double().mean() / s:.1%} of the tokens are selected, in the mean over the layers; {totals[0]:,} by no layer</p>
<p class="legend">Layers that select a token:<br>
{legend}</p>
<p class="faint">Point at a token to see its number, its id, and alpha layer by layer; ● is selected, ○ is not. Blanks
that are a token show as {blank}, tabs as {tab}, other white space as {OTHER_BLANK}; ends of lines as {feed} and {back}.
A byte of a character that several tokens share shows as &lt;0xE2&gt;, a token without text as ∅.</p>
<details><summary>Share selected, by position and by kind of token</summary>
<div class="scroll"><table><thead><tr>{header.replace("td>", "th>")}</tr></thead>
<tbody>{"".join(f"<tr>{row}</tr>" for row in rows)}</tbody></table></div></details>
<div id="text">{body}</div>
</body>
</html>
"""


def _hints(ids: list[int], decisions: GateDecisions) -> list[str]:
    """What pointing at each token shows."""
    hints = []
    columns = zip(ids, decisions.selected.T.tolist(), decisions.alpha.T.tolist(), strict=True)
    for number, (index, selected, alpha) in enumerate(columns):
        by_layer = zip(decisions.layers, selected, alpha, strict=True)
        lines = [f"layer {layer} {'●' if m else '○'} {a:.3f}" for layer, m, a in by_layer]
        hints.append("\n".join([f"token {number:,}, id {index}", *lines]))
    return hints


def _shown(parts: list[bytes]) -> list[str]:
    """The HTML of each token: the characters that end in it, and signs for what is not visible by itself."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    shown = []
    for part in parts:
        open_before = len(decoder.getstate()[0])  # bytes of a character that earlier tokens began
        text = decoder.decode(part)
        open_after = len(decoder.getstate()[0])
        if open_before:
            front = len(text[0].encode()) - open_before if text else len(part)
            back = open_after if text else 0
        else:
            front, back = 0, open_after
        alone = not text.strip()
        body = "".join(_character(c, alone) for c in text)
        shown.append(_bytes(part[:front]) + body + _bytes(part[len(part) - back :]) if part else _sign("∅"))
    return shown


def _character(character: str, alone: bool) -> str:
    """One character; with a sign if it ends a line, is a control character, or its token is only white space."""
    if character == "\0":
        return _sign("<0x00>", "\ufffd")
    if character in "\n\r" or (alone and character in SIGNS):
        return _sign(SIGNS[character], character)
    if alone and character.isspace():
        return _sign(OTHER_BLANK, character)
    if unicodedata.category(character) == "Cc" and character != "\t":
        return _sign(f"<0x{ord(character):02X}>", character)
    return escape(character)


def _bytes(part: bytes) -> str:
    """Bytes that are not a whole character."""
    return "".join(_sign(f"<0x{byte:02X}>") for byte in part)


def _sign(sign: str, instead_of: str = "") -> str:
    """A sign that the style sheet draws in place of a text, which can still be copied."""
    kept = instead_of.replace("\r", "&#13;")  # as it is, it would be read as an end of line
    return f'<i data-sign="{escape(sign)}">{kept}</i>'
