"""Loads an exported folder as a stranger would, and stores what it answers. Run by path in a fresh, isolated process.

    python -I reload_folder.py FOLDER REQUEST.json ANSWER.npy

The request holds `dtype`, `tokens` (rows of ids) and `texts`, pairs of a text and the ids that the tokenizer must give.
Our package is made impossible to import first, so that only what the folder holds can answer.
"""

import json
import sys


class Blocker:
    """Makes every import of our packages fail."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ("megatron_taipan", "checkpoints", "data_prep"):
            raise ImportError(f"{name} is not available to an exported folder")


def main(folder: str, request_file: str, answer_file: str) -> None:
    """Loads the folder, compares ids, writes the logits [b, l, v] float32."""
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    import numpy
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    if request["texts"]:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        for text, ids in request["texts"]:
            if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
                sys.exit(f"AutoTokenizer gives other ids than the tokenizer of the data for {text[:60]!r}")
    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    with torch.inference_mode():
        logits = model(torch.tensor(request["tokens"])).logits
    numpy.save(answer_file, logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:4])
