"""`python -m megatron_taipan.inference.generate MODEL --prompt TEXT`: continues prompts with a trained model."""

import argparse
import json
import sys
from pathlib import Path

import torch

from megatron_taipan.errors import UserError
from megatron_taipan.inference.generation import generate
from megatron_taipan.inference.loading import DTYPES, load_model, parse_device
from megatron_taipan.inference.sampling import Sampling
from megatron_taipan.inference.selection_watch import watched_selection
from megatron_taipan.inference.text import model_tokenizer
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m megatron_taipan.inference.generate", description=__doc__)
    parser.add_argument("model", type=Path, help="a checkpoint, a run's folder of checkpoints, or an exported folder")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument("--prompt-file", type=Path, nargs="+", default=[], help="UTF-8 files, each a whole prompt")
    parser.add_argument("--prompt-lines", action="store_true", help="every line of --prompt-file is a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=0.95, help="keep the most likely tokens up to this probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: seen tokens become less likely")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--ignore-end", action="store_true", help="do not stop at the end-of-document token")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file; default: the model's")
    parser.add_argument(
        "--prefill-chunk", type=int,
        help="tokens of each prompt per pass; bounds the memory; default: 2048, on a GPU 8192 for one prompt",
    )  # fmt: skip
    parser.add_argument("--ema", action="store_true", help="the weights' moving average (optim.ema_decay)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, with token ids")
    options = parser.parse_args(arguments)

    sampling = Sampling(
        options.temperature, options.top_k, options.top_p, options.repetition_penalty, options.seed
    )  # refused before the model is loaded
    texts = read_prompts(options.prompt, options.prompt_file, lines=options.prompt_lines)
    device = parse_device(options.device)
    model, tokenizer_file, config = load_model(options.model, DTYPES[options.dtype], ema=options.ema)
    named = options.tokenizer or tokenizer_file
    if named is None:
        raise UserError(f"{options.model} names no tokenizer; pass --tokenizer FILE")
    tokenizer = model_tokenizer(named, config.data if config else None)
    with watched_selection(model, str(options.model)):
        continuations = generate(
            model.to(device),
            [tokenizer.encode(text) for text in texts],
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            stop_tokens=() if options.ignore_end else tokenizer.end_ids,
            prefill_chunk=options.prefill_chunk,
        )
    for text, ids in zip(texts, continuations, strict=True):
        whole = tokenizer.decode(
            tokenizer.encode(text) + [i for i in ids if i not in tokenizer.end_ids], skip_special_tokens=True
        )
        print(
            json.dumps({"prompt": text, "text": whole, "new_tokens": ids}, ensure_ascii=False)
            if options.json
            else whole
        )
    return 0


def read_prompts(given: list[str], files: list[Path], *, lines: bool = False) -> list[str]:
    """The prompts of the command line, then those of the files.

    Args:
        lines: False: each file is one prompt, without the end of its last line. True: each line is one that holds more
            than white space.

    Raises:
        UserError: there is none, a file cannot be read or holds nothing, or lines are wanted of no file.
    """
    if lines and not files:
        raise UserError("--prompt-lines says how --prompt-file is read: name a file, or leave it out")
    prompts = list(given)
    for file in files:
        try:
            # as it is on the disk: read_text would turn the ends of lines of other systems into "\n"
            text = file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read prompts from {file}: {error}; a prompt is text in UTF-8") from error
        if not text.strip():
            raise UserError(f"{file} holds nothing to continue: it has {len(text):,} characters, all white space")
        if lines:
            # not splitlines(), which also cuts at form feeds and other characters within a line
            prompts += [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
        else:
            prompts.append(text.removesuffix("\n").removesuffix("\r"))
    if not prompts:
        raise UserError('there is nothing to continue: pass --prompt "some text" or --prompt-file FILE')
    return prompts


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
