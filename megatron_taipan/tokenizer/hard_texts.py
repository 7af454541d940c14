"""Texts on which tokenizers like to disagree: odd Unicode, white space, text that looks like special tokens.

Wherever one library stands in for another, their ids are compared on these besides the user's own text.
"""

import random

# few, since every run of `data_prep tokenize` compares them before it starts
HARD_TEXTS = (
    " leading and trailing ",
    "   \t\t  \n\n\n   white\u00a0space\u3000of \r\n every\x0bkind\u2028 ",
    "a" * 300 + " " * 300 + "\n" * 70,
    "don't DON'T I'LL we've \u2019s 1234567890 3.14159 1,000,000 \u00bd \u2167 \u0663",
    "\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c\u3002 \u65e5\u672c\u8a9e\u306e \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "e\u0301 \u00e9 \ufb01 \u0130i\u0307 \u212b \u1e9e\u00df na\u0131ve",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f600\U0001f600",
    "\u0000\u0001\u007f\u0085\ufeff\ufffd\u200b\u202e \U0010ffff \ue000",
    "<s> </s> <unk> <pad> <|endoftext|> <|begin_of_text|> <|im_start|> [INST] <0x0A> \u2581 \u0120the",
    "def f(x):\n\treturn {'a': [x**2 for _ in range(10)]}  # comment\n\n\n    if x != 3: pass\n",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d \u0bb5\u0bbe",
    'https://example.org/a?b=c&d=%20#e <a href="x">y</a> \\frac{1}{2} $$\\sum_{i=0}^n$$ ...!!!???---===',
)


def hostile_texts() -> list[str]:
    """The long list, with noise from many scripts, for exports."""
    fixed = [
        "",
        " ",
        "  ",
        " " * 1000,
        "\n\n\n \t\t  \r\n",
        " leading and trailing  ",
        "a" * 500,
        "tabs\tand\nnew lines\r\n  indented\n\n\n\n        code()",
        "<s>not a token</s> <unk> <pad> <0x0A> <|endoftext|>",
        "▁ literal ▁▁ blanks▁",
        "naïve café Å Å ﬁ ﬀ ﬃ ① ½ ﷺ ㎢ Ⅷ",
        "e\u0301 a\u0308\u0323 \u0344 \u1e9b\u0323 q\u0307\u0323",
        "नमस्ते ক্ষ สวัสดี 안녕 한국어 こんにちは 漢字 ﾊﾝｶｸ",
        "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☺️",
        "zero\u200bwidth\u200d joiner\ufeff bom \u00a0nbsp \u3000ideographic \u2028line \u2029para \u0085nel",
        "\u202eright to left\u202c שלום مرحبا",
        "control \x00 \x01 \x07 \x08 \x1b[0m \x7f \x9f",
        "\U0001d54f \U0010ffff \ue000 \ufffd \ufffe",
        "x" + "\u0300" * 50,
        "1234567890 3.14159 1,000,000 -5e-10 0x1F",
        "don't won't it's—“quoted” ‘text’ … – -",
        "def f(x):\n    return {'a': [1, 2, (3,)], \"b\": x**2}\n",
    ]
    draw = random.Random(0)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x900, 0x97F), (0x2000, 0x206F)]
    ranges += [(0x3040, 0x30FF), (0x4E00, 0x4FFF), (0xAC00, 0xAD00), (0x1F600, 0x1F64F), (0xFB00, 0xFB06)]
    noise = []
    for _ in range(200):
        spans = [draw.choice(ranges) for _ in range(draw.randint(1, 4))] + [(0x20, 0x20)]
        noise.append("".join(chr(draw.randint(*draw.choice(spans))) for _ in range(draw.randint(1, 60))))
    return fixed + noise
