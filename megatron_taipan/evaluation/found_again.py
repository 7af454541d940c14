"""Is a value found again that the text has shown: the two ways to score it, and prompts of a wanted length.

By generation: the prompt ends where the value belongs, the model goes on greedily, and the answer counts where it is
the value (`find_values`). By ranking: the text goes on with the value, and it counts where each of its tokens is the
most likely one after all before it (`count_ranked_first`). Greedy generation gives the value exactly where that holds,
so the second answers the same question, and one pass answers it for every value of a text.

Both read the text in chunks through the decoding cache, so their memory does not grow with the length but in layers of
full attention.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_taipan.errors import UserError
from megatron_taipan.inference.generation import check_prompts, generate
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.tokenizer.base import Tokenizer

CHUNK = 2048  # tokens per pass


@dataclass(frozen=True)
class Example:
    """One question: the value should follow the prompt."""

    prompt: list[int]
    value: str


@dataclass(frozen=True)
class RankedText:
    """A text that holds values to be scored by ranking: for each the places of its tokens."""

    tokens: list[int]
    values: list[range]


def is_value(reply: str, value: str) -> bool:
    """Whether an answer begins with the value, which no further letter or digit continues: 123456 is not 12345."""
    reply = reply.strip()
    return reply.startswith(value) and not reply[len(value) :][:1].isalnum()


def reply_in_text(
    model: Taipan, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, chunk: int = CHUNK
) -> list[str]:
    """What the model writes greedily after each prompt; the end of a document ends it."""
    replies = generate(
        model, prompts, max_new_tokens=max_new_tokens, stop_tokens=tokenizer.end_ids, prefill_chunk=chunk
    )
    return [
        tokenizer.decode([i for i in ids if i not in tokenizer.end_ids], skip_special_tokens=True) for ids in replies
    ]


def find_values(model: Taipan, tokenizer: Tokenizer, examples: list[Example]) -> list[bool]:
    """Whether greedy generation finds the value of each example; all share one batch."""
    longest = max(len(tokenizer.encode(f" {example.value}")) for example in examples)
    replies = reply_in_text(model, tokenizer, [example.prompt for example in examples], longest + 1)
    return [is_value(reply, example.value) for reply, example in zip(replies, examples, strict=True)]


@torch.inference_mode()
def count_ranked_first(model: Taipan, text: RankedText, chunk: int = CHUNK) -> int:
    """How many values of a text have all their tokens ranked first.

    Args:
        chunk: tokens per pass; bounds the memory, changes nothing else.

    Raises:
        UserError: an id is outside the vocabulary.
    """
    check_prompts(model, [text.tokens])
    device = next(model.parameters()).device
    tokens = torch.tensor([text.tokens], device=device)  # [1, l]
    cache, was_training = model.new_cache(1), model.training
    model.eval()
    # copied into one tensor: each of a list of small ones would hold a piece of the CPU's heap that chunks left free
    likely = torch.empty(len(text.tokens), dtype=torch.int64)
    for part, place in zip(tokens.split(chunk, 1), likely.split(chunk), strict=True):
        place.copy_(model(part, cache=cache).logits[0].argmax(-1))
    model.train(was_training)
    right = likely[:-1] == tokens[0, 1:].cpu()  # [l - 1]: of the token after each
    return sum(bool(right[place.start - 1 : place.stop - 1].all()) for place in text.values)


def longest_fit(text_of: Callable[[int], str], tokenizer: Tokenizer, length: int) -> str:
    """The text of the largest n that has at most `length` tokens.

    Args:
        text_of: a text for every n from 0 on, which grows by about as many tokens with each.

    Raises:
        UserError: not even n = 0 fits.
    """

    def size(n: int) -> int:
        return len(tokenizer.encode(text_of(n)))

    fits, tokens = 0, size(0)
    if tokens > length:
        raise UserError(
            f"needle and question ({tokens} tokens) do not fit into {length} tokens; choose a longer length"
        )
    grows = max(1.0, (size(8) - tokens) / 8)  # tokens for each n
    exceeds: int | None = None
    back = 1  # how far below `exceeds` the next guess is at least
    while exceeds != fits + 1:
        guess = fits + int((length - tokens) / grows)
        guess = max(fits + 1, guess if exceeds is None else min(guess, exceeds - back))
        of_guess = size(guess)
        if of_guess <= length:
            fits, tokens, back = guess, of_guess, 1
        else:
            # Most of the way back, as far as it seems: one by one, a text of a million tokens would be made, and
            # tokenized, hundreds of times; all of the way would pass texts that fit, since they do not grow evenly.
            seems = (of_guess - length) * (guess - fits) / (of_guess - tokens)
            exceeds, back = guess, max(1, int(seems * 3 / 4))
    return text_of(fits)
