"""`python -m checkpoints.export_hf CHECKPOINT OUT`: a trained checkpoint as a Hugging Face folder.

The folder holds weights, configuration, tokenizer, generation settings, a model card and the model's source files.
It is written under a temporary name, loaded again by a process that cannot import our package, compared with the
trainer's own forward pass, and renamed only if the logits agree and generate() goes by such logits too.

Weights are copied one tensor at a time, and models above --stream-above-gb are compared layer by layer, so the memory
that is needed does not grow with the number of layers. Those are compared in float32 arithmetic, on the weights as the
files hold them: products of bf16 are many times slower on a CPU without instructions for them.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy
import torch
from torch import Tensor

from checkpoints import reload_folder
from checkpoints.bundle import bundle_sources
from checkpoints.model_card import model_card
from checkpoints.safetensors_files import write_sharded
from checkpoints.streamed import stream
from checkpoints.tokenizer import hostile_texts, write_tokenizer
from megatron_taipan.checkpoint.merge import TrainedState, open_state
from megatron_taipan.checkpoint.verification import refuse_damaged
from megatron_taipan.config import Config, ModelConfig
from megatron_taipan.data.made_with import added_ids, refuse_other
from megatron_taipan.errors import UserError, exits_cleanly, writing
from megatron_taipan.inference.loading import DTYPES
from megatron_taipan.inference.text import load_codec, sample_texts
from megatron_taipan.model.flops import model_params
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.layout import describe

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
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder of checkpoints (the newest)")
    parser.add_argument("out", type=Path, help="folder to write; must not exist unless --overwrite")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights; float32 islands stay float32")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file; default: what the checkpoint's config names")
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest weight file, in 10^9 bytes")
    parser.add_argument(
        "--stream-above-gb", type=float, default=STREAM_ABOVE / 1e9, metavar="GB",
        help="models larger than this in float32 are checked layer by layer instead of being loaded whole",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parser.parse_args(arguments)
    state = open_state(options.checkpoint)
    refuse_damaged(state.path)  # the check of the logits reads the same bytes twice, and would find them equal
    tokenizer = None if options.no_tokenizer else find_tokenizer(state, options.tokenizer)
    with writing(options.out):
        difference = export(
            state,
            options.out,
            dtype=DTYPES[options.dtype],
            tokenizer=tokenizer,
            max_shard_bytes=options.max_shard_gb * 1e9,
            overwrite=options.overwrite,
            stream_above=options.stream_above_gb * 1e9,
        )
    print(f"wrote {options.out}: logits agree with the trainer's to {difference:.1e} (relative; limit {TOLERANCE:.0e})")
    return 0


def export(
    state: TrainedState,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    stream_above: float = STREAM_ABOVE,
) -> float:
    """Writes the folder; returns the relative difference of the logits that the check found.

    Raises:
        UserError: the folder exists, the tokenizer cannot be converted exactly, or the reloaded logits disagree.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another folder or pass --overwrite")
    if out.is_file() or out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        # a run's own folder, given by mistake, would be lost with all its checkpoints
        raise UserError(f"{out} is no exported folder, so --overwrite does not remove it; choose another folder")
    out = out.resolve()  # a link stays one, and shows the new export
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    old = work.with_name(work.name + ".old")
    try:
        texts = sample_texts(state.config.data, tokenizer) if tokenizer else []
        write_folder(state, work, dtype, tokenizer, texts, max_shard_bytes)
        difference = check_folder(state, work, dtype, tokenizer, texts, stream_above)
        _sync(work)
        work.chmod(0o755)
        if out.exists():
            out.rename(old)  # at once: a folder whose deletion is cut short must not look like an export
        work.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return difference


def write_folder(
    state: TrainedState,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: Path | None,
    texts: list[str],
    max_shard_bytes: float,
) -> None:
    """Fills `folder` with every file of the export. `texts`: on which a converted tokenizer must agree."""
    config = state.config
    special: dict[str, int] = {}
    if tokenizer is not None:
        added = added_ids(source.prefix for source in config.data.train)
        special = write_tokenizer(tokenizer, folder, texts, config.data.seq_len, config.model.vocab_size, added)
    for name, text in bundle_sources().items():
        (folder / name).write_text(text, encoding="utf-8")
    write_json(folder / "config.json", config_json(config, dtype, special))
    write_json(folder / "generation_config.json", special)
    card = model_card(config, state.step, state.tokens, str(dtype)[6:], tokenizer is not None)
    (folder / "README.md").write_text(card)
    write_sharded(
        folder,
        {f"model.{name}": stored for name, stored in stored_tensors(config.model, dtype).items()},
        lambda name: state.load(name.removeprefix("model.")),
        max_shard_bytes,
    )


def config_json(config: Config, dtype: torch.dtype, special: dict[str, int]) -> dict:
    """What transformers reads as the model's configuration."""
    return {
        "architectures": ["TaipanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_taipan.TaipanConfig",
            "AutoModelForCausalLM": "modeling_taipan.TaipanForCausalLM",
        },
        "model_type": "taipan",
        "dtype": str(dtype)[6:],
        "tokens_per_sample": config.data.seq_len,
        **{key: value for key, value in special.items() if key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "network": config.model.model_dump(mode="json"),
    }


def check_folder(
    state: TrainedState,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: Path | None,
    texts: list[str],
    stream_above: float,
) -> float:
    """Compares the folder, loaded by a stranger's process, with the trainer's forward pass on the same tokens, and
    its AutoTokenizer with the tokenizer that the data was made with.

    Raises:
        UserError: it does not load, or its logits, or those by which generate() goes, differ by more than TOLERANCE
            of the largest.
    """
    config, probe = state.config.model, probe_of(state.config.model)
    streamed = 4 * model_params(config) > stream_above
    tokens = torch.randint(0, config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = trainer_logits(probe, state, tokens, dtype, torch.float32 if streamed else dtype, PREFILL)
    codec = load_codec(tokenizer) if tokenizer else None
    pairs = [(text, codec.encode(text)) for text in [*hostile_texts(), *texts]] if codec else []
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch, "request.json"), Path(scratch, "answer.npy")
        asked = {
            "dtype": str(dtype)[6:], "tokens": tokens.tolist(), "prefill": PREFILL, "texts": pairs,
            "streamed": streamed, "network": config.model_dump(mode="json"), "probe": probe.model_dump(mode="json"),
            "sketch": sketch_of(probe).model_dump(mode="json"), "count": COUNT, "tolerance": TOLERANCE,
        }  # fmt: skip
        write_json(request, asked)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        clean |= {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-I", reload_folder.__file__, str(folder.resolve()), str(request), str(answer)]
        done = subprocess.run(command, cwd=scratch, env=clean, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"the exported folder does not stand by itself ({last[0]}); nothing was written")
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
    state: TrainedState,
    tokens: Tensor,
    dtype: torch.dtype,
    compute: torch.dtype,
    prefill: int | None = None,
) -> Tensor:
    """The trainer's model on tokens [b, l], its weights read layer by layer.

    Args:
        dtype: to which the weights are rounded, but for the float32 islands; compute: in which they are multiplied.
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
    """Shape and dtype in the file of every parameter and buffer; float32 islands and buffers stay float32."""
    table = describe(config)
    with torch.device("meta"):
        model = Taipan(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    lower = {name for name, spec in table.items() if not spec.float32}
    return {name: (shape, dtype if name in lower else torch.float32) for name, shape in shapes.items()}


def find_tokenizer(state: TrainedState, given: Path | None) -> Path | None:
    """The tokenizer file to export: the one given, else the one that the configuration names.

    Raises:
        UserError: that file does not exist, or the data's manifests say that it was made with another.
    """
    named = given or (Path(state.config.data.tokenizer) if state.config.data.tokenizer else None)
    if named is None:
        print("note: the configuration names no data.tokenizer; the folder will hold none", file=sys.stderr)
        return None
    if not named.is_file():
        raise UserError(f"the tokenizer {named} does not exist; pass --tokenizer FILE or --no-tokenizer")
    prefixes = [source.prefix for source in state.config.data.train]
    refuse_other(prefixes, named, "--tokenizer" if given else "data.tokenizer")
    return named


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """Makes sure that the files are on the disk before the folder gets its name."""
    paths: Iterable[Path] = [*folder.iterdir(), folder]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
