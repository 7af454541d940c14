"""`python -m megatron_taipan.evaluation.passkey MODEL`: can the model repeat a number that it read long ago?

A five-digit key is hidden somewhere in a long filler text, and the text ends with the question for it
(arXiv 2305.16300, appendix). Answers are decoded greedily and count as right if they begin with the key.
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_taipan.errors import UserError, exits_cleanly
from megatron_taipan.inference.generation import generate
from megatron_taipan.inference.loading import DTYPES, load_model, parse_device
from megatron_taipan.inference.text import model_tokenizer
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.tokenizer.base import Tokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Example:
    """One question."""

    prompt: list[int]
    key: str


def make_example(tokenizer: Tokenizer, length: int, depth: float, key: str) -> Example:
    """A prompt of at most `length` tokens with the key at `depth` (0: at the start, 1: right before the question).

    Only whole sentences of filler are used, so the prompt falls short of `length` by less than one round of them.

    Raises:
        UserError: needle and question do not fit into the length.
    """
    needle, question = NEEDLE.format(key=key), QUESTION

    def text(rounds: int) -> str:
        before = round(rounds * depth)
        return FILLER * before + needle + FILLER * (rounds - before) + question

    if len(tokenizer.encode(text(0))) > length:
        raise UserError(
            f"needle and question ({len(tokenizer.encode(text(0)))} tokens) do not fit into {length} tokens"
        )
    rounds = length // max(1, len(tokenizer.encode(FILLER)))
    while len(tokenizer.encode(text(rounds))) > length:
        rounds -= 1
    return Example(tokenizer.encode(text(rounds)), key)


def accuracy(
    examples: list[Example], tokenizer: Tokenizer, answer: Callable[[list[list[int]]], list[list[int]]]
) -> float:
    """The share of right answers. `answer` continues a batch of prompts."""
    replies = answer([example.prompt for example in examples])
    right = [
        tokenizer.decode(ids, skip_special_tokens=True).strip().startswith(e.key)
        for e, ids in zip(examples, replies, strict=True)
    ]
    return sum(right) / len(right)


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m megatron_taipan.evaluation.passkey", description=__doc__)
    parser.add_argument("model", type=Path, help="a checkpoint, a run's folder of checkpoints, or an exported folder")
    parser.add_argument("--lengths", default="512,1024,2048", help="tokens of the prompts, separated by commas")
    parser.add_argument("--depths", type=int, default=5, help="positions of the key, evenly from the start to the end")
    parser.add_argument("--samples", type=int, default=10, help="keys for each length and depth")
    parser.add_argument("--seed", type=int, default=0, help="of the keys")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file; default: the model's")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    try:
        lengths = [int(word) for word in options.lengths.split(",")]
    except ValueError as error:
        raise UserError(f"--lengths={options.lengths} must be numbers separated by commas") from error
    if options.depths < 1 or options.samples < 1:
        raise UserError(f"--depths={options.depths} and --samples={options.samples} must be at least 1")
    model, tokenizer_file, config = load_model(options.model, DTYPES[options.dtype])
    named = options.tokenizer or tokenizer_file
    if named is None:
        raise UserError(f"{options.model} names no tokenizer; pass --tokenizer FILE")
    tokenizer = model_tokenizer(named, config.data if config else None)
    print_accuracy(
        model.to(parse_device(options.device)), tokenizer, lengths, options.depths, options.samples, options.seed
    )
    return 0


def print_accuracy(
    model: Taipan, tokenizer: Tokenizer, lengths: list[int], n_depths: int, samples: int, seed: int
) -> None:
    """Prints the share of right answers, a line a length and a column a depth."""
    depths = [i / max(1, n_depths - 1) for i in range(n_depths)]
    answer_tokens = max(len(tokenizer.encode(f" {key}")) for key in (12345, 99999, 70707)) + 1

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        return generate(model, prompts, max_new_tokens=answer_tokens, stop_tokens=tokenizer.end_ids)

    print(f"{'tokens':>8} " + " ".join(f"{f'depth {depth:.2f}':>10}" for depth in depths))
    draw = random.Random(seed)
    for length in lengths:
        shares = []
        for depth in depths:
            keys = [f"{draw.randint(10000, 99999)}" for _ in range(samples)]
            examples = [make_example(tokenizer, length, depth, key) for key in keys]
            shares.append(accuracy(examples, tokenizer, answer))
        print(f"{length:>8} " + " ".join(f"{share:>10.2f}" for share in shares), flush=True)


if __name__ == "__main__":
    sys.exit(main())
