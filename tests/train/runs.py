"""Training runs inside a test's process group, and what their folders tell of them."""

import json
import os
from pathlib import Path

import torch

from megatron_taipan.config_loading import make_config
from megatron_taipan.errors import UserError

CPU = torch.device("cpu")
# what is measured rather than computed
TIMING = ("time", "step_s", "tokens_per_s", "data_wait_s", "memory_gb", "checkpoint_stall_s")


def runs(trees: list[dict], device: torch.device = CPU) -> list:
    """Trains each configuration after the other in this process group; gives exit statuses or error messages."""
    from megatron_taipan.parallel.processes import find_place
    from megatron_taipan.train.loop import train

    results = []
    for tree in trees:
        try:
            results.append(train(make_config(tree), find_place(os.environ), device))
        except UserError as error:
            results.append(str(error))
    return results


def records(directory: Path) -> list[dict]:
    """The log so far. A reader can come between the two halves of a line that is being written: whole lines only."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_bytes().split(b"\n")[:-1]]


def steps_so_far(directory: Path) -> int:
    """The last step that is in the log of a run under way; 0 before there is one."""
    steps = [record["step"] for record in log(directory)] if (directory / "log.jsonl").exists() else []
    return steps[-1] if steps else 0


def log(directory: Path, event: str = "step") -> list[dict]:
    return [record for record in records(directory) if record["event"] == event]


def numbers(directory: Path) -> list[tuple]:
    """What must be equal to the last bit: every step's losses, norm, rate and gate statistics."""
    return [tuple((k, v) for k, v in record.items() if k not in TIMING) for record in log(directory)]


def with_options(tree: dict, **sections: dict) -> dict:
    return {
        name: tree.get(name, {}) | sections.get(name, {}) if isinstance(tree[name], dict) else tree[name]
        for name in tree
    }
