"""What `retrieval` asks: a sentence in a filler text, a number in a phonebook, the partners of many words.

Every sample is drawn from a generator of its own, so that a sample is the same whatever else is asked.
"""

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation import passkey
from megatron_taipan.evaluation.found_again import Example, RankedText, longest_fit
from megatron_taipan.evaluation.words import FIRST_NAMES, LAST_NAMES, NOUNS, SENTENCES
from megatron_taipan.tokenizer.base import Tokenizer

# arXiv 2404.06654 (RULER), the single needle of its base-model prompts
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? The special magic number for {key}"
    " mentioned in the provided text is"
)
INITIALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PHONEBOOK = "phonebook"
SHOTS = 2  # of a phonebook, as in its source
IN_SENTENCES = set(re.findall(r"\w+", " ".join(SENTENCES)))
RECALL_WORDS = [word for word in NOUNS if word not in IN_SENTENCES]
KEYS, VALUES = RECALL_WORDS[::2], RECALL_WORDS[1::2]


@dataclass(frozen=True)
class Filler:
    """Sentences between those that matter: drawn one by one, or a run of a text of one's own."""

    sentences: Sequence[str]
    in_order: bool

    def take(self, count: int, draw: random.Random) -> list[str]:
        """As many sentences; those of a larger count begin with those of a smaller one."""
        if not self.in_order:
            return draw.choices(self.sentences, k=count)
        first = draw.randrange(len(self.sentences))
        return [self.sentences[(first + i) % len(self.sentences)] for i in range(count)]


def read_filler(file: Path | None) -> Filler:
    """The sentences of a text file, in their order; None: the built-in ones.

    Raises:
        UserError: the file cannot be read, or holds no text.
    """
    if file is None:
        return Filler(SENTENCES, in_order=False)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the filler text from {file}: {error}") from error
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]
    if not sentences:
        raise UserError(f"{file} holds no text to hide a sentence in; name another file")
    return Filler(sentences, in_order=True)


def make_passkey(tokenizer: Tokenizer, length: int, depth: float, draw: random.Random, filler: Filler) -> Example:
    """A number in a repeated text (`passkey`); its filler is its own."""
    return passkey.make_example(tokenizer, length, depth, passkey.draw_key(draw))


def make_needle(tokenizer: Tokenizer, length: int, depth: float, draw: random.Random, filler: Filler) -> Example:
    """A sentence with a number, hidden at `depth` between whole sentences (arXiv 2404.06654, section 3)."""
    key, value, seed = draw.choice(NOUNS), str(draw.randint(1_000_000, 9_999_999)), draw.random()

    def text(count: int) -> str:
        sentences = filler.take(count, random.Random(seed))
        sentences.insert(round(count * depth), NEEDLE.format(key=key, value=value))
        return " ".join([*sentences, QUESTION.format(key=key)])

    return Example(tokenizer.encode(longest_fit(text, tokenizer, length)), value)


def make_phonebook(tokenizer: Tokenizer, length: int, depth: float, draw: random.Random, filler: Filler) -> Example:
    """Lines `name: number`, two of them once more as examples, and a name (arXiv 2402.01032, section 4).

    `depth` is the place of the asked line in the book. Names are distinct.
    """
    seed = draw.random()
    names = len(FIRST_NAMES) * len(INITIALS) * len(LAST_NAMES)

    def entries(count: int) -> list[tuple[str, str]]:
        if count > names:
            raise UserError(
                f"a phonebook of {length:,} tokens needs more than the {names:,} names there are; choose a shorter"
                " length, or leave phonebook out of --kinds"
            )
        again = random.Random(seed)
        return [(full_name(i), phone_number(again)) for i in again.sample(range(names), count)]

    def text(count: int) -> str:
        book = entries(count + SHOTS + 1)
        asked, *shots = asked_places(len(book), depth, random.Random(seed))
        lines = [f"{name}: {number}" for name, number in book]
        return "\n".join([*lines, "", *(lines[i] for i in shots), f"{book[asked][0]}:"])

    prompt = longest_fit(text, tokenizer, length)
    name = prompt.rsplit("\n", 1)[1]
    number = next(line for line in prompt.split("\n") if line.startswith(f"{name} "))
    return Example(tokenizer.encode(prompt), number.removeprefix(f"{name} "))


def full_name(index: int) -> str:
    """The name of a number; different numbers give different names."""
    rest, last = divmod(index, len(LAST_NAMES))
    first, initial = divmod(rest, len(INITIALS))
    return f"{FIRST_NAMES[first]} {INITIALS[initial]}. {LAST_NAMES[last]}"


def phone_number(draw: random.Random) -> str:
    """As in 609-323-7777."""
    return f"{draw.randint(200, 999)}-{draw.randint(200, 999)}-{draw.randint(0, 9999):04}"


def asked_places(lines: int, depth: float, draw: random.Random) -> list[int]:
    """The line that is asked for, then those that serve as examples."""
    asked = round((lines - 1) * depth)
    return [asked, *draw.sample([i for i in range(lines) if i != asked], SHOTS)]


DEPTH_KINDS: dict[str, Callable[[Tokenizer, int, float, random.Random, Filler], Example]] = {
    "passkey": make_passkey,
    "needle": make_needle,
    PHONEBOOK: make_phonebook,
}


def make_recall(tokenizer: Tokenizer, length: int, pairs: int, draw: random.Random, filler: Filler) -> RankedText:
    """Pairs of words one after the other, then every first word once more, in random order between sentences.

    The rows of experiments/recall_task.py in words: keys are distinct, values are drawn independently, and a filler
    (whole sentences, in which none of these words occurs) takes up the rest of the row. Here the value follows its key
    where it is asked for too, as in text; no key is asked for twice, so that this answers no other question.

    Raises:
        UserError: there are not as many words, or the row is too short for the pairs.
    """
    if pairs > len(KEYS):
        raise UserError(f"{pairs} pairs need as many words that differ, and there are {len(KEYS)}")
    keys, values, seed = draw.sample(KEYS, pairs), draw.choices(VALUES, k=pairs), draw.random()
    lines = [f"{key} {value}." for key, value in zip(keys, values, strict=True)]

    def parts(count: int) -> list[str]:
        again = random.Random(seed)
        return again.sample(lines + again.choices(SENTENCES, k=count), pairs + count)

    try:
        text = longest_fit(lambda count: " ".join(lines + parts(count)), tokenizer, length)
    except UserError as error:
        raise UserError(f"{pairs} pairs, each twice, do not fit into {length} tokens; choose fewer --pairs") from error
    asked = text[len(" ".join(lines)) :]
    places = [len(text) - len(asked) + asked.index(f" {key} ") + 2 + len(key) for key in keys]
    spans = [(place, place + len(value)) for place, value in zip(places, values, strict=True)]
    return place_values(tokenizer, text, spans)


def place_values(tokenizer: Tokenizer, text: str, spans: list[tuple[int, int]]) -> RankedText:
    """An ASCII text whose values lie at the spans of characters: their tokens are all that touch them."""
    ids, parts = tokenizer.encode_with_bytes(text)
    borders = [0, *accumulate(map(len, parts))]  # of the tokens, in characters
    begins, ends = borders[:-1], borders[1:]
    places = [range(bisect_right(ends, first), bisect_left(begins, last)) for first, last in spans]
    assert all(places)  # a value without tokens would count as found
    return RankedText(ids, places)
