"""Pretrains a Taipan (or a baseline of the same family): the program that launch/pretrain.py and taipan-pretrain start.

    deepspeed --num_gpus 8 launch/pretrain.py --config launch/configs/taipan_190m.yaml train.steps=20000
    torchrun --nproc_per_node 8 launch/pretrain.py --config ...
    srun python launch/pretrain.py --config ...            (launch/slurm/pretrain.sbatch)

Installed, away from a checkout: taipan-pretrain, or torchrun --nproc_per_node 8 -m megatron_taipan.pretrain.

Options of the configuration are given as section.option=value and override the file. Exit status: 0 finished (or
stopped at train.stop_at), 2 the input is wrong (one line says what), 69 the processes did not meet, 70 nothing moved
for train.hang_after_s, 74 the last checkpoint could not be written, 75 stopped by a signal with a checkpoint: start
the same command again (docs/reliability.md).
"""

import argparse
import os
import sys
import textwrap
import time
import traceback
from typing import NoReturn


def incomplete_environment(error: ImportError) -> int:
    """Says what to do, and gives the status of wrong input: the next start would lack the same package."""
    traceback.print_exc()
    print(f"error: {sys.executable} cannot import what training needs ({error}); make the environment with 'make venv',"
          " and start with its python (launch/slurm/pretrain.sbatch: VENV)", file=sys.stderr, flush=True)  # fmt: skip
    return 2


try:
    from megatron_taipan.config_loading import load_config, presets, refuse_unexpanded
    from megatron_taipan.config_text import describe_options
    from megatron_taipan.engine.build import check_stages
    from megatron_taipan.errors import EXIT_REQUEUE, UserError
    from megatron_taipan.parallel.processes import device_of_process, find_place, leave, report, stop_processes
    from megatron_taipan.programs import with_streams
    from megatron_taipan.train.distributed import start_processes
    from megatron_taipan.train.dry_run import dry_run
    from megatron_taipan.train.signals import StopSignals
except ImportError as error:
    sys.exit(incomplete_environment(error))


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = parse(arguments)
    try:
        place = find_place(os.environ)
        config = load_config(options.config, options.overrides)
        refuse_unexpanded(config)
        processes = options.processes if options.dry_run and options.processes is not None else place.world_size
        check_stages(config, processes)
        if options.dry_run:
            for line in dry_run(config, processes):
                print(line, flush=True)
            return 0
        device = device_of_process(place)
        start_processes(place, device, config.parallel.timeout_s)
        from megatron_taipan.train.loop import train  # imported late: a typo in the configuration shows at once

        status = train(config, place, device)
        if status == EXIT_REQUEUE:
            # Launchers kill what still runs when a process ends with a failure, and would then report the kill. So
            # only rank 0 has the status, and it ends last.
            if place.rank != 0:
                status = 0
            else:
                with StopSignals():  # all is saved: an impatient second Ctrl-C must not replace the status
                    time.sleep(2)
    except UserError as error:
        status = report(error)
    # Not after an unexpected error: its traceback may hold recorded graphs, for which NCCL would wait here.
    stop_processes()
    return status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line; argparse itself exits with status 2 on errors."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"presets: {presets()}\n\n{options_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print parameters, layout and steps, and stop"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="with --dry-run: the number of processes to check the layout for"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="options that override the file's")
    return parser.parse_intermixed_args(arguments)  # overrides may be on both sides of an option


def options_text() -> str:
    """Every option of the configuration with default and meaning."""
    lines = ["options of the configuration (name, default, meaning):"]
    for name, default, meaning in describe_options():
        lines.append(f"  {name} [{default}]")
        lines += textwrap.wrap(meaning, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def program() -> NoReturn:
    """`main` as a separate process: ends with its status, 1 with a traceback after an unexpected error."""
    try:
        status = with_streams(main)
    except UserError as error:  # of its standard output; `main` reports all others
        status = report(error)
    except ImportError as error:
        status = incomplete_environment(error)
    except Exception:
        traceback.print_exc()
        status = 1
    leave(status)


if __name__ == "__main__":
    program()
