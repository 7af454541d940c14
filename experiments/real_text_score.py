"""`python -m experiments.real_text_score RUN --out FILE`: scores a trained model for real_text.py.

Writes JSON:
    by_distance     class -> [mean cross entropy in nats, tokens] on the held-out documents; "all", and the classes of
                    evaluation/recall_tokens.py by distance in tokens: "new", "1-64", ..., ">4096"
    by_context      tokens of context -> mean cross entropy on held-out documents that are longer; null: there are none
    params          parameters of the network
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from megatron_taipan.data.loader import build_dataset
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.perplexity import score
from megatron_taipan.evaluation.recall_tokens import EDGES, score_by_distance
from megatron_taipan.inference.loading import load_model, parse_device
from megatron_taipan.programs import exits_cleanly

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1 << 20, help="held-out tokens scored, at each length of context")
    options = parser.parse_args(arguments)
    device = parse_device("auto")
    model, _, config = load_model(options.run, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if config is None:
        raise UserError(f"{options.run} is not a run of launch/pretrain.py; name the checkpoint folder of one")
    model.to(device)
    # the same samples whatever the run's order of samples was
    data, vocab = config.data.model_copy(update={"seed": 0}), config.model.vocab_size
    found = score_by_distance(
        model, build_dataset(data, "valid", vocab), samples=options.tokens // data.seq_len, batch=8
    )
    names = ["new", *(f"{low + 1}-{high}" for low, high in itertools.pairwise((0, *EDGES))), f">{EDGES[-1]}"]
    by_distance = {"all": [found.total.ce, found.total.tokens]}
    for name, nats, tokens in zip(names, found.nats, found.tokens, strict=True):
        if tokens:
            by_distance[name] = [nats / tokens, tokens]
    by_context: dict[int, float | None] = {}
    for length in CONTEXTS:
        # whole documents: in a longer row of packed short ones the context is not longer
        try:
            long = build_dataset(data.model_copy(update={"seq_len": length, "one_document": True}), "valid", vocab)
            by_context[length] = score(model, long, samples=options.tokens // length, batch=max(1, 32768 // length)).ce
        except UserError as error:
            print(f"context {length}: {error}", file=sys.stderr)
            by_context[length] = None
    options.out.write_text(
        json.dumps({"by_distance": by_distance, "by_context": by_context, "params": model.num_params()}),
        encoding="utf-8",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
