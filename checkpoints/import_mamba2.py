"""`python -m checkpoints.import_mamba2 SOURCE OUT --config FILE`: a warm start from Mamba-2 weights.

Reads the folder of a `state-spaces/mamba2-*` model (mamba_ssm's names) or of a transformers Mamba2ForCausalLM, and
puts its blocks into the `M` layers of the configured network, in order. Attention layers start anew.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoints.transplant import Source, transplant
from megatron_taipan.config import ModelConfig, load_config
from megatron_taipan.errors import UserError, exits_cleanly, writing

PLAIN = {  # per layer: theirs to ours, unchanged
    "norm.weight": "norm.weight",
    "mixer.dt_bias": "mixer.dt_bias",
    "mixer.A_log": "mixer.A_log",
    "mixer.D": "mixer.D",
    "mixer.norm.weight": "mixer.norm_weight",
    "mixer.out_proj.weight": "mixer.out_proj",
}


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.import_mamba2", description=__doc__)
    parser.add_argument("source", type=Path, help="folder with config.json and .safetensors or pytorch_model.bin")
    parser.add_argument("out", type=Path, help="folder to write; start the run with checkpoint.init=OUT")
    parser.add_argument("--config", type=Path, required=True, help="configuration of the new run")
    parser.add_argument("overrides", nargs="*", help="section.option=value")
    options = parser.parse_intermixed_args(arguments)  # overrides may follow --config
    config = load_config(options.config, options.overrides)
    source = mamba2_source(options.source, config.model)
    with writing(options.out):
        report = transplant(config.model, source, options.out, config.train.seed)
    print(report.text())
    print(f"wrote {options.out}; start with checkpoint.init={options.out}")
    return 0


def mamba2_source(folder: Path, target: ModelConfig) -> Source:
    """The tensors of a Mamba-2 folder under our names; fused ones are cut at the target's sizes.

    in_proj holds the rows of z, x, B, C and dt one after the other, conv1d the channels of x, B and C (mamba_ssm 2.x).

    Raises:
        UserError: the folder cannot be read, is no Mamba-2, or has other sizes than the target.
    """
    settings = read_settings(folder)
    refuse_other_architecture(folder, settings, target)
    shapes, read = open_tensors(folder)
    m = target.mamba
    inner, states, heads = target.d_inner, m.n_groups * m.d_state, target.mamba_heads
    projections = {"z": inner, "x": inner, "B": states, "C": states, "dt": heads}
    channels = {"x": inner, "B": states, "C": states}

    ours: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}

    def shape_of(theirs: str) -> tuple[int, ...]:
        if theirs not in shapes:
            raise UserError(f"{folder} holds no {theirs}; its weights are incomplete")
        return shapes[theirs]

    def whole(name: str, theirs: str) -> None:
        ours[name] = (shape_of(theirs), partial(read, theirs))

    def cut(pattern: str, theirs: str, parts: dict[str, int]) -> None:
        rows, start = shape_of(theirs)[0], 0
        if rows != sum(parts.values()):
            sizes = " + ".join(f"{part} {size}" for part, size in parts.items())
            raise UserError(
                f"{folder}: {theirs} has {rows} rows, the target needs {sum(parts.values())} ({sizes}); set d_model,"
                " mamba.expand, d_state, n_groups and headdim to the source's"
            )
        for part, size in parts.items():
            rest = tuple(s for s in shape_of(theirs)[1:] if s != 1)  # conv1d has a dimension of one in the middle
            ours[pattern.format(part)] = ((size, *rest), partial(_rows, read, theirs, start, size, rest))
            start += size

    n_layers = 0
    while (head := f"backbone.layers.{n_layers}.") + "norm.weight" in shapes:
        mine = f"layers.{n_layers}."
        for theirs, name in PLAIN.items():
            whole(mine + name, head + theirs)
        cut(mine + "mixer.in_proj_{}", head + "mixer.in_proj.weight", projections)
        cut(mine + "mixer.conv_{}_weight", head + "mixer.conv1d.weight", channels)
        if head + "mixer.conv1d.bias" in shapes:
            cut(mine + "mixer.conv_{}_bias", head + "mixer.conv1d.bias", channels)
        n_layers += 1
    if not n_layers:
        raise UserError(f"{folder} holds no backbone.layers.0.norm.weight: these are no Mamba-2 weights")
    said = settings.get("n_layer", settings.get("num_hidden_layers", n_layers))
    if n_layers != said:  # a shard that was never copied: nobody wants its layers drawn anew
        raise UserError(f"{folder} holds {n_layers} of the {said} layers that its config.json names; it is incomplete")
    names = ("backbone.embedding.weight", "backbone.embeddings.weight")
    embedding = next((name for name in names if name in shapes), names[0])
    whole("embedding.weight", embedding)
    whole("final_norm.weight", "backbone.norm_f.weight")
    if not target.tie_embeddings:
        whole("head.weight", "lm_head.weight" if "lm_head.weight" in shapes else embedding)
    return Source("M" * n_layers, {name: shape for name, (shape, _) in ours.items()}, lambda name: ours[name][1]())


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json of the source."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json cannot be read: {error}") from error


def refuse_other_architecture(folder: Path, settings: dict[str, Any], target: ModelConfig) -> None:
    """Whether the source computes what our `M` layers compute.

    Raises:
        UserError: naming the setting that differs.
    """
    inner = settings.get("ssm_cfg", {})
    if settings.get("model_type", "mamba2") != "mamba2" or inner.get("layer", "Mamba2") != "Mamba2":
        raise UserError(f"{folder} is a {inner.get('layer') or settings.get('model_type')}, not a Mamba-2 model")
    ours = {
        "use_bias": False, "attn_layer_idx": [], "d_intermediate": 0, "rms_norm": True,
        "layer_norm_epsilon": target.norm_eps, "use_conv_bias": target.mamba.conv_bias,
    }  # fmt: skip
    for key, wanted in ours.items():
        if settings.get(key, wanted) != wanted:
            raise UserError(f"{folder} has {key}={settings[key]!r}; this network has {wanted!r} there")
    limit = [number(value) for value in settings.get("time_step_limit", [0.0, float("inf")])]
    if limit != [0.0, float("inf")]:
        raise UserError(f"{folder} limits the time step to {limit}; this network does not")
    groups = settings.get("n_groups", inner.get("ngroups", 1))
    if settings.get("model_type") == "mamba2" and groups > 1:
        raise UserError(
            f"{folder} is a transformers Mamba2 with n_groups={groups}: its gated norm spans all groups, ours (as"
            " mamba_ssm's) one group each; only n_groups=1 is the same network"
        )


def number(value: Any) -> float:
    """A number of config.json; transformers 5 writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def open_tensors(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes by name, and a function that reads one tensor in float32. Files cannot execute code.

    Raises:
        UserError: there is no file with weights, or it cannot be read.
    """
    where: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            opened = safe_open(file, framework="pt")
        except Exception as error:  # the library raises its own type for damaged files
            raise UserError(f"{file} is no whole safetensors file: {error}") from error
        where |= dict.fromkeys(opened.keys(), opened)
    if where:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
        return shapes, lambda name: where[name].get_tensor(name).float()
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        try:
            tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise UserError(f"{path} is not a plain file of tensors: {error}") from error
    if not tensors:
        raise UserError(f"{folder} holds neither .safetensors files nor pytorch_model.bin")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, lambda name: tensors[name].float()


def _rows(read: Callable[[str], Tensor], name: str, start: int, size: int, rest: tuple[int, ...]) -> Tensor:
    """Rows [start, start + size) of a tensor as [size, *rest]."""
    return read(name).narrow(0, start, size).reshape(size, *rest)


if __name__ == "__main__":
    sys.exit(main())
