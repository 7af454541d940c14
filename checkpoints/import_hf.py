"""`python -m checkpoints.import_hf FOLDER OUT [--config FILE]`: weights of an exported model for a new run.

Without --config the network stays the same and the exported folder itself would do as `checkpoint.init`; with it the
weights go into another pattern (layers match by letter), and the report says what is new.
"""

import argparse
import sys
from pathlib import Path

from checkpoints.transplant import Source, transplant
from megatron_taipan.checkpoint.weights import open_weights
from megatron_taipan.config import load_config
from megatron_taipan.errors import UserError, exits_cleanly, writing


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.import_hf", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that checkpoints.export_hf or an import wrote")
    parser.add_argument("out", type=Path, help="folder to write; start the run with checkpoint.init=OUT")
    parser.add_argument("--config", type=Path, help="configuration of the new run; default: the folder's own network")
    parser.add_argument("overrides", nargs="*", help="section.option=value")
    options = parser.parse_intermixed_args(arguments)  # overrides may follow --config
    if options.overrides and not options.config:
        raise UserError(f"{' '.join(options.overrides)}: options override a configuration; pass --config FILE")
    weights = open_weights(options.folder)
    config = load_config(options.config, options.overrides) if options.config else None
    source = Source(weights.network.letters, {name: weights.shape(name) for name in weights.names()}, weights.load)
    target = config.model if config else weights.network
    with writing(options.out):
        report = transplant(target, source, options.out, config.train.seed if config else 0)
    print(report.text())
    print(f"wrote {options.out}; start with checkpoint.init={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
