"""Loads an exported folder as a stranger would, and stores what it answers. Run by path in a fresh, isolated process.

    python -I reload_folder.py FOLDER REQUEST.json ANSWER.npy

The request holds `dtype`, `tokens` (rows of ids), `texts` (pairs of a text and the ids that the tokenizer must give)
and `streamed`: whether the model is too large to be loaded whole; then the folder's class reads it layer by layer.
Our package is made impossible to import first, so that only what the folder holds can answer.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


class Blocker:
    """Makes every import of our packages fail."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ("megatron_taipan", "checkpoints", "data_prep"):
            raise ImportError(f"{name} is not available to an exported folder")


def load_whole(folder: str, dtype: Any) -> Any:
    """The model as any user of transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


def load_streamed(folder: str, dtype: Any) -> Any:
    """The folder's class without weights, which it reads from the folder's files whenever it needs them.

    Raises:
        ValueError: a weight is not stored in the type that transformers would give it.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    place = importlib.util.spec_from_file_location("streamed", Path(__file__).with_name("streamed.py"))
    streamed = importlib.util.module_from_spec(place)
    place.loader.exec_module(streamed)

    kind: Any = get_class_from_dynamic_module("modeling_taipan.TaipanForCausalLM", folder)
    kind.post_init = lambda self: None  # would draw initial weights
    with torch.device("meta"):
        model = kind(AutoConfig.from_pretrained(folder, trust_remote_code=True)).eval()
    wide = set(model._keep_in_fp32_modules_strict)
    files = [safe_open(file, "pt") for file in sorted(Path(folder).glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}

    def load(name: str) -> Any:
        value = where[f"model.{name}"].get_tensor(f"model.{name}")
        if value.dtype != (torch.float32 if f"model.{name}" in wide else dtype):
            raise ValueError(f"model.{name} is stored as {value.dtype}")
        return value

    streamed.stream(model.model, load)
    return model


def main(folder: str, request_file: str, answer_file: str) -> None:
    """Loads the folder, compares ids, writes the logits [b, l, v] float32."""
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    import numpy
    import torch
    from transformers import AutoTokenizer

    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    if request["texts"]:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        for text, ids in request["texts"]:
            if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
                sys.exit(f"AutoTokenizer gives other ids than the tokenizer of the data for {text[:60]!r}")
    model = (load_streamed if request["streamed"] else load_whole)(folder, getattr(torch, request["dtype"]))
    with torch.inference_mode():
        logits = model(torch.tensor(request["tokens"])).logits
    numpy.save(answer_file, logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:4])
