"""`python -m megatron_taipan.evaluation.passkey MODEL`: can the model repeat a number that it read long ago?

A five-digit key is hidden somewhere in a long filler text, and the text ends with the question for it
(arXiv 2305.16300, appendix). Answers are decoded greedily and count as right if they begin with the key.
`retrieval --kinds passkey` asks the same of several models, for any lengths, and leaves tables and heat maps.
"""

import argparse
import random
import sys
from pathlib import Path

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.found_again import Example, find_values, longest_fit
from megatron_taipan.evaluation.lengths import parse_lengths
from megatron_taipan.evaluation.text_models import find_model
from megatron_taipan.inference.loading import DTYPES
from megatron_taipan.inference.selection_watch import watched_selection
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly
from megatron_taipan.tokenizer.base import Tokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is"


def make_example(tokenizer: Tokenizer, length: int, depth: float, key: str) -> Example:
    """A prompt of at most `length` tokens with the key at `depth` (0: at the start, 1: right before the question).

    Only whole sentences of filler are used, so the prompt falls short of `length` by less than one round of them.

    Raises:
        UserError: needle and question do not fit into the length.
    """
    needle = NEEDLE.format(key=key)

    def text(rounds: int) -> str:
        before = round(rounds * depth)
        return FILLER * before + needle + FILLER * (rounds - before) + QUESTION

    return Example(tokenizer.encode(longest_fit(text, tokenizer, length)), key)


def draw_key(draw: random.Random) -> str:
    """Five digits."""
    return f"{draw.randint(10000, 99999)}"


def spread_depths(count: int) -> list[float]:
    """Depths from 0 to 1, evenly; one alone is 0."""
    return [i / max(1, count - 1) for i in range(count)]


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m megatron_taipan.evaluation.passkey", description=__doc__)
    parser.add_argument("model", type=Path, help="a checkpoint, a run's folder of checkpoints, or an exported folder")
    parser.add_argument("--lengths", default="512,1024,2048", help="tokens of the prompts, such as 512,4K")
    parser.add_argument("--depths", type=int, default=5, help="positions of the key, evenly from the start to the end")
    parser.add_argument("--samples", type=int, default=10, help="keys for each length and depth")
    parser.add_argument("--seed", type=int, default=0, help="of the keys")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file; default: the model's")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    lengths = parse_lengths(options.lengths)
    if options.depths < 1 or options.samples < 1:
        raise UserError(f"--depths={options.depths} and --samples={options.samples} must be at least 1")
    found = find_model(options.model, options.tokenizer)
    network = found.load(options)
    with watched_selection(network, found.name):
        print_accuracy(network, found.tokenizer, lengths, options.depths, options.samples, options.seed)
    return 0


def print_accuracy(
    model: Taipan, tokenizer: Tokenizer, lengths: list[int], n_depths: int, samples: int, seed: int
) -> None:
    """Prints the share of right answers, a line a length and a column a depth."""
    depths = spread_depths(n_depths)
    print(f"{'tokens':>8} " + " ".join(f"{f'depth {depth:.2f}':>10}" for depth in depths))
    draw = random.Random(seed)
    for length in lengths:
        shares = []
        for depth in depths:
            examples = [make_example(tokenizer, length, depth, draw_key(draw)) for _ in range(samples)]
            found = find_values(model, tokenizer, examples)
            shares.append(sum(found) / len(found))
        print(f"{length:>8} " + " ".join(f"{share:>10.2f}" for share in shares), flush=True)


if __name__ == "__main__":
    sys.exit(main())
