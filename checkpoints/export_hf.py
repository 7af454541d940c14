"""`python -m checkpoints.export_hf MODEL OUT`: a checkpoint, or a folder of weights, as a Hugging Face folder.

The folder holds weights, configuration, tokenizer, generation settings, a model card, the model's source files and the
checksums of all that. Of a folder that was exported or imported before, tokenizer, generation settings and card stay.
It is written under a temporary name, loaded again by a process that cannot import our package, compared with the
trainer's own forward pass, and renamed only if the logits agree and generate() goes by such logits too.

Weights are copied one tensor at a time, and models above --stream-above-gb are compared layer by layer, so the memory
that is needed does not grow with the number of layers. Those are compared in float32 arithmetic, on the weights as the
files hold them: products of bf16 are many times slower on a CPU without instructions for them.
"""

import argparse
import inspect
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from torch import Tensor

from checkpoints import chat_template, reload_folder
from checkpoints.bundle import bundle_sources
from checkpoints.carried import TOKENIZER
from checkpoints.checksums import SUMS, WEIGHTS, changed_files, write_sums
from checkpoints.export_files import Text, note, short, write_carried, write_described, write_json
from checkpoints.safetensors_files import write_sharded
from checkpoints.streamed import stream
from checkpoints.whole_folder import remove_or_restore_leftovers, whole_folder
from megatron_taipan.checkpoint.verification import refuse_damaged
from megatron_taipan.checkpoint.weights import CheckpointWeights, ExportedWeights, is_export, open_weights
from megatron_taipan.data.made_with import refuse_other
from megatron_taipan.errors import UserError, refuse_other_locales, writing
from megatron_taipan.inference.loading import DTYPES
from megatron_taipan.model.flops import model_params
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parameters import parameter_table
from megatron_taipan.programs import exits_cleanly
from megatron_taipan.tokenizer.hard_texts import hostile_texts
from megatron_taipan.tokenizer.load import load_tokenizer_file

TOLERANCE = 1e-5  # largest difference of a logit, relative to the largest logit
ROWS, LENGTH, PREFILL = 2, 64, 40  # tokens of the check; the first 40 of a row in one pass, the rest from its cache
COUNT = 4  # tokens that generate() writes in each call of the check
CHUNK, WINDOW = 16, 24  # tokens of a chunk of the scan and of a window in the check: several of each fit
ROUNDED_ROWS = 4096  # of a matrix at once
STREAM_ABOVE = 4_000_000_000  # bytes of a float32 model


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.export_hf", description=__doc__.split("\n")[0])
    parser.add_argument(
        "model",
        type=Path,
        help="a checkpoint, a run's folder of checkpoints (the newest), an exported or imported folder",
    )
    parser.add_argument("out", type=Path, help="folder to write; must not exist unless --overwrite")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the weights; float32 ones of the network stay so"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file; default: what the checkpoint's config names")
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="jinja template of conversations")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest weight file, in 10^9 bytes")
    parser.add_argument(
        "--stream-above-gb", type=float, default=STREAM_ABOVE / 1e9, metavar="GB",
        help="models larger than this in float32 are checked layer by layer instead of being loaded whole",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parser.parse_args(arguments)
    if not options.max_shard_gb > 0:  # not >: nan must fail too
        raise UserError(f"--max-shard-gb={options.max_shard_gb:g} is not a size; give 10^9 bytes above 0, such as 5")
    if not options.stream_above_gb >= 0:
        raise UserError(f"--stream-above-gb={options.stream_above_gb:g} is not a size; give 10^9 bytes, 0 or more")
    state = open_weights(options.model, ema=options.ema)
    refuse_changed(state)  # the check of the logits reads the same bytes twice, and would find them equal
    with writing(options.out):
        difference = export(
            state,
            options.out,
            dtype=DTYPES[options.dtype],
            tokenizer=None if options.no_tokenizer else find_tokenizer(state, options.tokenizer),
            carry_tokenizer=not options.no_tokenizer,
            template=options.chat_template,
            max_shard_bytes=options.max_shard_gb * 1e9,
            overwrite=options.overwrite,
            stream_above=options.stream_above_gb * 1e9,
        )
    print(f"wrote {options.out}: logits agree with the trainer's to {difference:.1e} (relative; limit {TOLERANCE:.0e})")
    return 0


def export(
    state: CheckpointWeights | ExportedWeights,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
    carry_tokenizer: bool = True,
    template: Path | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    stream_above: float = STREAM_ABOVE,
) -> float:
    """Writes the folder; returns the relative difference of the logits that the check found.

    Args:
        tokenizer: the file that the data was made with.
        carry_tokenizer: where none is given, a folder's own tokenizer is taken over as it is.
        template: a chat template; None: the one that is taken over, if any.

    Raises:
        UserError: the folder exists, the tokenizer cannot be converted exactly, the template fails, or the reloaded
            logits disagree.
    """
    refuse_other_locales(out)
    out = out.resolve()  # a link stays one, and shows the new export
    for sentence in remove_or_restore_leftovers(out):
        note(sentence)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another folder or pass --overwrite")
    if out.is_file() or out.is_dir() and any(out.iterdir()) and not is_export(out):
        # a run's own folder, given by mistake, would be lost with all its checkpoints
        raise UserError(f"{out} is not an exported folder, so --overwrite does not remove it; choose another folder")
    own = isinstance(state, ExportedWeights) and carry_tokenizer and (state.path / TOKENIZER).is_file()
    if template is not None and tokenizer is None and not own:
        raise UserError(f"the chat template {template} needs a tokenizer, and the folder will hold none")
    with whole_folder(out, overwrite=overwrite) as work:
        text = write_folder(state, work, dtype, tokenizer, own, template, max_shard_bytes)
        difference = check_folder(state, work, dtype, text, stream_above)
        write_sums(work)
    return difference


def write_folder(
    state: CheckpointWeights | ExportedWeights,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: Path | None,
    carry_tokenizer: bool,
    template: Path | None,
    max_shard_bytes: float,
) -> Text:
    """Fills `folder` with every file of the export but the checksums; returns what it must do with text."""
    for name, source in bundle_sources().items():
        (folder / name).write_text(source, encoding="utf-8")
    if isinstance(state, ExportedWeights):
        text = write_carried(state, folder, dtype, tokenizer, carry_tokenizer, template is not None)
    else:
        text = write_described(state, folder, dtype, tokenizer, template is not None)
    if template is not None:
        source, chat = chat_template.read_template(template, dict(text.special))
        (folder / chat_template.CHAT_TEMPLATE_FILE).write_text(source, encoding="utf-8")
        text = replace(text, chat=chat)
    write_sharded(
        folder,
        {f"model.{name}": stored for name, stored in stored_tensors(state.network, dtype).items()},
        lambda name: state.load(name.removeprefix("model.")),
        max_shard_bytes,
    )
    return text


def check_folder(
    state: CheckpointWeights | ExportedWeights, folder: Path, dtype: torch.dtype, text: Text, stream_above: float
) -> float:
    """Compares the folder, loaded by a stranger's process, with the trainer's forward pass on the same tokens, and
    its AutoTokenizer with the tokenizer that the data was made with.

    Raises:
        UserError: it does not load, or its logits, or those by which generate() goes, differ by more than TOLERANCE
            of the largest.
    """
    config, probe = state.network, probe_of(state.network)
    streamed = 4 * model_params(config) > stream_above
    tokens = torch.randint(0, config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = trainer_logits(probe, state, tokens, dtype, torch.float32 if streamed else dtype, PREFILL)
    tokenizer = load_tokenizer_file(text.tokenizer) if text.tokenizer else None
    pairs = [(each, tokenizer.encode(each)) for each in [*hostile_texts(), *text.samples]] if tokenizer else []
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch, "request.json"), Path(scratch, "answer.npy")
        asked = {
            "dtype": short(dtype), "tokens": tokens.tolist(), "prefill": PREFILL, "texts": pairs,
            "special": {} if text.carried else dict(text.special),
            "chat": text.chat and [chat_template.SAMPLE, text.chat],
            "streamed": streamed, "network": config.model_dump(mode="json"), "probe": probe.model_dump(mode="json"),
            "sketch": sketch_of(probe).model_dump(mode="json"), "count": COUNT, "tolerance": TOLERANCE,
        }  # fmt: skip
        hub = {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        # Not python -I, which hides the packages that clusters have in PYTHONPATH and ~/.local; and not where it lies,
        # since Python looks for modules there first.
        with writing(Path(scratch)):  # TMPDIR may be full where the export's disk is not
            write_json(request, asked)
            program = shutil.copy(reload_folder.__file__, scratch)
            shutil.copy(inspect.getfile(stream), scratch)
        if paths := os.environ.get("PYTHONPATH"):  # it may name folders as seen from here
            hub["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
        command = [sys.executable, program, str(folder.resolve()), str(request), str(answer)]
        done = subprocess.run(
            command, cwd=scratch, env=os.environ | hub, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"the exported folder does not load by itself ({last[0]}); nothing was written")
        got = torch.from_numpy(numpy.load(answer))
    scale = expected.abs().max().clamp(min=1e-30)
    difference = float((got - expected).abs().max() / scale) if got.shape == expected.shape else math.inf
    if not difference <= TOLERANCE:  # not <=: NaN must fail too
        raise UserError(
            f"the exported model's logits differ from the trainer's by {difference:.2e} of the largest logit"
            f" (limit {TOLERANCE:.0e}); nothing was written"
        )
    return difference


def probe_of(config: ModelConfig) -> ModelConfig:
    """The network that the check computes: its windows and chunks are so short that few tokens cross several.

    The weights are the same ones. What config.json says of the real lengths is compared by itself.
    """
    mamba = config.mamba.model_copy(update={"chunk_size": min(config.mamba.chunk_size, CHUNK)})
    attention = config.attention.model_copy(update={"window": min(config.attention.window, WINDOW)})
    return config.model_copy(update={"mamba": mamba, "attention": attention})


def sketch_of(config: ModelConfig) -> ModelConfig:
    """A network of a few thousand weights with a layer of each kind that `config` has, and its other options.

    `generate()` is tried on it: what can go wrong there depends on the code and the release of transformers, not on
    the weights, and this costs the same for a model of any size. Its weights are so large that every layer counts.
    """
    tree = config.model_dump(mode="json")
    sizes = {"pattern": "".join(dict.fromkeys(config.letters)), "vocab_size": 61, "d_model": 24, "d_ff": 32}
    mamba = {"d_state": 8, "headdim": 8, "n_groups": 2, "expand": 2}
    attention = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6}
    parts = {"mamba": tree["mamba"] | mamba, "attention": tree["attention"] | attention}
    return ModelConfig.model_validate(tree | sizes | parts | {"init_std": 0.2})


@torch.inference_mode()
def trainer_logits(
    config: ModelConfig,
    state: CheckpointWeights | ExportedWeights,
    tokens: Tensor,
    dtype: torch.dtype,
    compute: torch.dtype,
    prefill: int | None = None,
) -> Tensor:
    """The trainer's model on tokens [b, l], its weights read layer by layer.

    Args:
        dtype: to which the weights are rounded, but for the float32 parameters; compute: in which they are multiplied.
        prefill: tokens of the first pass; the others are computed from its cache. None: one pass, no cache.

    Returns:
        Logits [b, l, v] float32.
    """
    with torch.device("meta"):
        model = Taipan(config).eval()
    stored = stored_tensors(config, dtype)

    def load(name: str) -> Tensor:
        value, kept = state.load(name), stored[name][1]
        if kept != dtype or compute == kept:
            return value.to(kept)
        wide = torch.empty_like(value, dtype=compute)
        for ours, theirs in zip(wide.split(ROUNDED_ROWS), value.split(ROUNDED_ROWS), strict=True):
            ours.copy_(theirs.to(kept))  # no third copy of the whole tensor
        return wide

    stream(model, load)
    if prefill is None:
        return model(tokens).logits.float()
    cache = model.new_cache(len(tokens), tokens.device, compute)
    parts = (tokens[:, :prefill], tokens[:, prefill:])
    return torch.cat([model(part, cache=cache).logits.float() for part in parts], 1)


def stored_tensors(config: ModelConfig, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype in the file of every parameter and buffer; float32 parameters and buffers stay float32."""
    table = parameter_table(config)
    with torch.device("meta"):
        model = Taipan(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    lower = {name for name, spec in table.items() if not spec.float32}
    return {name: (shape, dtype if name in lower else torch.float32) for name, shape in shapes.items()}


def find_tokenizer(state: CheckpointWeights | ExportedWeights, given: Path | None) -> Path | None:
    """The tokenizer file to export: the one given, else the one that a checkpoint's configuration names.

    Raises:
        UserError: that file does not exist, or the data's manifests say that it was made with another.
    """
    if isinstance(state, ExportedWeights):
        named = given
    else:
        named = given or (Path(state.config.data.tokenizer) if state.config.data.tokenizer else None)
        if named is None:
            note("the configuration names no data.tokenizer; the folder will hold none")
    if named is not None and not named.is_file():
        raise UserError(f"the tokenizer {named} does not exist; pass --tokenizer FILE or --no-tokenizer")
    if named is not None and isinstance(state, CheckpointWeights):
        prefixes = [source.prefix for source in state.config.data.train]
        refuse_other(prefixes, named, "--tokenizer" if given else "data.tokenizer")
    return named


def refuse_changed(state: CheckpointWeights | ExportedWeights) -> None:
    """Raises UserError if files of the source are not what they were when they were written, where that is known."""
    if isinstance(state, CheckpointWeights):
        refuse_damaged(state.path)
    elif (state.path / SUMS).is_file():
        faults = [fault for fault in changed_files(state.path) if fault.split()[0].endswith(WEIGHTS)]
        if faults:
            raise UserError(f"{state.path} is damaged: {'; '.join(faults)}; copy or export it again")


if __name__ == "__main__":
    sys.exit(main())
