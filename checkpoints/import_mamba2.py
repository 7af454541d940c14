"""`python -m checkpoints.import_mamba2 SOURCE OUT --config FILE`: a warm start from the weights of another library.

Reads the folder of a `state-spaces/mamba2-*` model (mamba_ssm's names), of a transformers Mamba2ForCausalLM, or of a
GraniteMoeHybrid or Bamba of attention layers only, and puts its layers into the `M` or `A` layers of the configured
network, in order. Other layers start from new initial values. What the source computes and this network does not is
refused, and nothing is written unless the weights give the source's logits.
"""

import argparse
import sys
from pathlib import Path

from checkpoints.foreign.files import open_tensors, read_settings
from checkpoints.foreign.hybrids import from_bamba, from_granite
from checkpoints.foreign.mamba2 import from_mamba_ssm, from_transformers
from checkpoints.map_weights import Source, map_weights
from megatron_taipan.config_loading import load_config
from megatron_taipan.errors import UserError, writing
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.programs import exits_cleanly

READERS = {
    "mamba2": from_transformers,
    "granitemoehybrid": from_granite,
    "bamba": from_bamba,
}  # by model_type


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
    source = open_source(options.source, config.model)
    with writing(options.out):
        report = map_weights(config.model, source, options.out, config.train.seed)
    print(report.text())
    print(f"wrote {options.out}; start with checkpoint.init={options.out}")
    return 0


def open_source(folder: Path, target: ModelConfig) -> Source:
    """The tensors of a folder under our names.

    Raises:
        UserError: the folder cannot be read, is of no kind that is known here, or computes something else than the
            target's layers.
    """
    settings = read_settings(folder)
    kind = str(settings.get("model_type"))
    if kind == "None" and "d_model" in settings:  # mamba_ssm's names no type
        return from_mamba_ssm(folder, target, settings, *open_tensors(folder))
    if kind not in READERS:
        raise UserError(
            f"{folder} has model_type={kind!r}; known are {', '.join(READERS)} of transformers, and mamba_ssm's models"
            " (no model_type, but d_model)"
        )
    return READERS[kind](folder, target, *open_tensors(folder))


if __name__ == "__main__":
    sys.exit(main())
