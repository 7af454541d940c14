"""Loads an exported folder as a stranger would, and stores its logits. Run by path in a fresh, isolated process.

    python -I reload_folder.py FOLDER TOKENS.npy LOGITS.npy DTYPE

Our package is made impossible to import first, so that only what the folder holds can answer.
"""

import sys


class Blocker:
    """Makes every import of our package fail."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ("megatron_taipan", "checkpoints", "data_prep"):
            raise ImportError(f"{name} is not available to an exported folder")


def main(folder: str, tokens_file: str, logits_file: str, dtype: str) -> None:
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    import numpy
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype)).eval()
    tokens = torch.from_numpy(numpy.load(tokens_file))
    with torch.inference_mode():
        numpy.save(logits_file, model(tokens).logits.float().numpy())
    if (len(sys.argv) > 5) and sys.argv[5] == "tokenizer":
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:5])
