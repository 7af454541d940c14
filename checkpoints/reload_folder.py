"""Loads an exported folder as a stranger would, and stores what it answers. Run by path in a fresh process.

    python reload_folder.py FOLDER REQUEST.json ANSWER.npy

The request holds `dtype`, `tokens` (rows of ids; `prefill` of each in a first pass, the rest from its cache), `texts`
(pairs of a text and the ids that the tokenizer must give with special tokens taken as text), `special` (their
spellings by kind, which it must read as special tokens otherwise, BOS before each text where there is one), `chat` (a
conversation and what the chat template makes of it), `network`, which the folder's configuration must describe,
`probe`, the same with shorter windows and chunks, which is computed, `streamed`: whether the model is too large to
be loaded whole; then the folder's class reads it layer by layer and computes in float32; and `sketch`, a small network
of the same kinds of layers, on which `generate()` is tried to within `tolerance`.
Our packages are made impossible to import first, so that only what the folder holds can answer.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Blocker:
    """Makes every import of our packages fail."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ("megatron_taipan", "checkpoints", "data_prep"):
            raise ImportError(f"{name} is not available to an exported folder")


def load_whole(folder: str, config: Any, dtype: Any) -> Any:
    """The model as any user of transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True, dtype=dtype).eval()


def load_streamed(folder: str, config: Any, dtype: Any) -> Any:
    """The folder's class without weights, which it reads from the folder's files whenever it needs them, as float32.

    Raises:
        ValueError: a weight is not stored in the type that transformers would give it.
    """
    import torch
    from safetensors import safe_open
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    place = importlib.util.spec_from_file_location("streamed", Path(__file__).with_name("streamed.py"))
    assert place is not None and place.loader is not None  # a file beside this one
    streamed = importlib.util.module_from_spec(place)
    place.loader.exec_module(streamed)

    kind: Any = get_class_from_dynamic_module("modeling_taipan.TaipanForCausalLM", folder)
    sys.modules[kind.__module__].TaipanPreTrainedModel.post_init = lambda self: None  # would draw initial weights
    with torch.device("meta"):
        model = kind(config).eval()
    wide = set(model._keep_in_fp32_modules_strict)
    files = [safe_open(file, "pt") for file in sorted(Path(folder).glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}

    def load(name: str) -> Any:
        if name == "head.weight" and f"model.{name}" not in where:
            name = "embedding.weight"  # shared
        if f"model.{name}" not in where:
            name = name.removesuffix(".weight")  # of a matrix that a module holds
        value = where[f"model.{name}"].get_tensor(f"model.{name}")
        if value.dtype != (torch.float32 if f"model.{name}" in wide else dtype):
            raise ValueError(f"model.{name} is stored as {value.dtype}")
        return value.float()

    parts = {name: getattr(model.model, name) for name in ("embedding", "layers", "final_norm")}
    streamed.stream(SimpleNamespace(**parts, head=model.lm_head), load)
    return model


def cache_for_pass(model: Any, rows: int, streamed: bool) -> Any:
    """None, with which the model makes its own cache; one in the host's memory where the model is streamed."""
    if not streamed:
        return None
    import torch

    cache = sys.modules[type(model).__module__].TaipanCache()
    cache.state = model.model.new_cache(rows, torch.device("cpu"), torch.float32)
    return cache


def refuse_wrong_generation(model: Any, prompt: Any, count: int, tolerance: float) -> None:
    """Ends the process where the logits by which `generate()` chooses are not those of one pass over the same text.

    Tried with a cache, without one, and from the cache that an earlier call returned. Which names and shapes
    transformers passes from step to step differs between its releases; the forward pass alone does not show it.

    Args:
        model: in float64; prompt: [b, l]; count: tokens to write in each call.
        tolerance: largest difference, relative to the largest logit.
    """
    import torch
    from transformers import __version__

    def generate(text: Any, how: str, **options: Any) -> Any:
        options |= {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "output_logits": True}
        mask = torch.ones_like(text)
        written = model.generate(text, attention_mask=mask, return_dict_in_generate=True, **options)
        chosen_by = torch.stack(written.logits, 1)  # [b, count, v]
        wanted = model(written.sequences).logits[:, -1 - count : -1]
        difference = float((chosen_by - wanted).abs().max() / wanted.abs().max())
        if not difference <= tolerance:  # NaN must fail too
            sys.exit(
                f"generate() of transformers {__version__} {how} goes by logits that differ from those of one pass over"
                f" its text by {difference:.2e} of the largest (limit {tolerance:.0e})"
            )
        return written

    generate(prompt, "without a cache", use_cache=False)
    first = generate(prompt, "with a cache")
    name = next((name for name in ("cache", "past_key_values") if first.get(name) is not None), None)
    if name is None:
        sys.exit(f"generate() of transformers {__version__} returns no cache")
    generate(first.sequences, "from a returned cache", **{name: first[name]})


def refuse_wrong_text(tokenizer: Any, request: dict[str, Any]) -> None:
    """Ends the process where the folder's tokenizer does something else with text than the request says."""
    for text, ids in request["texts"]:
        if tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] != ids:
            sys.exit(f"AutoTokenizer gives other ids than the tokenizer of the data for {text[:60]!r}")
    begin = request["special"].get("bos_token")
    for kind, spelled in request["special"].items():
        plain = tokenizer(spelled, add_special_tokens=False)["input_ids"]
        if len(plain) != 1 or plain != [getattr(tokenizer, f"{kind}_id")]:
            sys.exit(f"AutoTokenizer reads {spelled!r} as the ids {plain}, not as its {kind}")
        head = [tokenizer.bos_token_id] if begin is not None else []
        if tokenizer(spelled)["input_ids"] != head + plain:
            sys.exit(f"AutoTokenizer does not put {begin or 'nothing'} before a text")
    if request["chat"]:
        messages, wanted = request["chat"]
        written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if written != wanted:
            sys.exit(f"apply_chat_template writes {written[:60]!r} where the template gives {wanted[:60]!r}")


def main(folder: str, request_file: str, answer_file: str) -> None:
    """Loads the folder, compares ids, writes the logits [b, l, v] float32, tries `generate()`."""
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    import numpy
    import torch
    from transformers import AutoConfig, AutoTokenizer

    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    if request["texts"]:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        refuse_wrong_text(tokenizer, request)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if config.network != request["network"]:
        sys.exit("config.json describes another network than the checkpoint's")
    config.network = request["probe"]
    load = load_streamed if request["streamed"] else load_whole
    model = load(folder, config, getattr(torch, request["dtype"]))
    tokens, prefill = torch.tensor(request["tokens"]), request["prefill"]
    with torch.inference_mode():
        first = model(
            tokens[:, :prefill], past_key_values=cache_for_pass(model, len(tokens), request["streamed"]), use_cache=True
        )
        rest = model(tokens[:, prefill:], past_key_values=first.past_key_values)
        sketch = type(model)(type(config)(network=request["sketch"])).double().eval()
        prompt = tokens[:, :prefill] % request["sketch"]["vocab_size"]
        refuse_wrong_generation(sketch, prompt, request["count"], request["tolerance"])
    logits = torch.cat([first.logits, rest.logits], 1)
    numpy.save(answer_file, logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:4])
