# ruff: noqa: B023  (every measurement runs inside the loop turn that defines it)
"""`benchmark.py memory`: the largest micro batch of a training step."""

import argparse

from launch.benchmark_common import Table, preset
from launch.benchmark_step import our_step


def run(options: argparse.Namespace) -> None:
    table = Table("memory", options.out)
    for recompute in ("none", "selective", "full"):
        batch = options.batch
        while batch <= options.largest:
            options.overrides, options.batch = [f"parallel.recompute={recompute}"], batch
            config = preset(options)
            table.attempt(f"{config.name}, micro batch {batch}, recompute {recompute}", lambda: our_step(config, False))
            if "failed" in table.rows[-1]:
                break
            batch *= 2
        options.batch = 4
