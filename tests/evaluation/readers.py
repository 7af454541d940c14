"""Stand-ins for models that read perfectly: they look the answer up in the text of the prompt."""

import re

from megatron_taipan.evaluation.found_again import RankedText
from megatron_taipan.tokenizer.base import Tokenizer

ASKS = {  # how the text told what its end asks for; {0} is the name that the end has
    r"The pass key is$": r"The pass key is (\d+)\. Remember",
    r"The special magic number for (\w+) mentioned in the provided text is$": r"numbers for {0} is: (\d+)\.",
    r"\n([^\n]+):$": r"^{0}: ([\d-]+)$",
}


def read_prompt(text: str) -> str:
    """The value that the end of a prompt asks for."""
    for question, told in ASKS.items():
        if asked := re.search(question, text):
            return re.search(told.format(*map(re.escape, asked.groups())), text, re.M)[1]
    raise AssertionError(f"nothing is asked at the end: {text[-80:]!r}")


def reading_generate(codec: Tokenizer):
    """In place of `generate`."""

    def reply(model, prompts, *, max_new_tokens, **_):
        return [codec.encode(f" {read_prompt(codec.decode(prompt).strip())}")[:max_new_tokens] for prompt in prompts]

    return reply


def read_pairs(codec: Tokenizer, row: RankedText) -> int:
    """In place of `count_ranked_first`: how many values follow a key as they followed it at its first occurrence."""
    right = 0
    for place in row.values:
        before, value = codec.decode(row.tokens[: place.start]), codec.decode(row.tokens[place.start : place.stop])
        key = before.split()[-1]
        right += re.search(rf"\b{key} (\w+)\.", before)[1] == value.strip(" .")
    return right
