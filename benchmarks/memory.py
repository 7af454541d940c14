"""`python -m benchmarks memory`: the memory of a training step, and the largest micro batch that fits.

Memory is what torch has reserved on the GPU, including freed blocks that it keeps and recorded graphs, which no count
of live tensors includes. A step's peak grows linearly with the micro batch, so two small batches predict the largest;
the prediction is then tried, and corrected one by one until a batch fits and the next one does not.
"""

import argparse
import gc
import itertools

import torch

from benchmarks.common import Table, add_preset, preset
from benchmarks.step import composition_training, our_training
from megatron_taipan.config import Config
from megatron_taipan.errors import UserError

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    add_preset(parser)
    parser.add_argument("--only", nargs="*", help="rows whose names hold these words")
    parser.add_argument("--largest", type=int, default=64, help="where the search for the largest batch ends")


def run(options: argparse.Namespace) -> None:
    table = Table("memory", options.out)
    config = preset(options)
    if not options.only or "composition" in options.only:
        table.attempt(f"composition of existing parts, micro batch {options.batch}", lambda: composition_peak(config))
    for recompute in ("none", "selective", "full"):
        if options.only and recompute not in options.only:
            continue
        changed = config.model_copy(deep=True)
        changed.parallel.recompute = recompute
        search(table, changed, options)


def composition_peak(config: Config) -> dict:
    """Peak of the second step, when the optimizer's state exists."""
    training = composition_training(config)
    training.step()
    torch.cuda.reset_peak_memory_stats()
    training.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_reserved()
    training.end()
    return {"peak GiB": round(peak / GIB, 2)}


def search(table: Table, config: Config, options: argparse.Namespace) -> None:
    """Rows for the usual micro batch and for the largest one that fits, from the peaks of a few."""
    name, recompute = config.name, config.parallel.recompute
    peaks = {batch: our_peak(config, batch) for batch in (1, options.batch)}
    table.add(f"{name}, recompute {recompute}, micro batch {options.batch}", **peak_row(peaks[options.batch]))
    first, usual = peaks[1], peaks[options.batch]
    if first is None or usual is None:
        return
    free, _ = torch.cuda.mem_get_info()
    room = free + torch.cuda.memory_reserved()
    guess = int(1 + (room - first) // ((usual - first) / (options.batch - 1)))
    guess = max(1, min(guess, options.largest))
    for batch in itertools.count(guess, -1):  # down to one that fits
        peaks[batch] = peaks.get(batch) or our_peak(config, batch)
        if peaks[batch] is not None or batch == 1:
            break
    while batch + 1 not in peaks and batch < options.largest:  # and up to one that does not
        peaks[batch + 1] = our_peak(config, batch + 1)
        if peaks[batch + 1] is None:
            break
        batch += 1
    tried = " ".join(f"{b}:{'-' if peak is None else round(peak / GIB, 1)}" for b, peak in sorted(peaks.items()))
    what = "largest micro batch" if batch < options.largest else "micro batch at the end of the search"
    table.add(f"{name}, recompute {recompute}, {what}", batch=batch, **peak_row(peaks[batch]), tried=tried)


def peak_row(peak: int | None) -> dict:
    return {"peak GiB": round(peak / GIB, 2)} if peak is not None else {"failed": "out of memory"}


def our_peak(config: Config, batch: int) -> int | None:
    """Peak bytes of the second step; None where it does not fit. Everything is built again each time: a step that ran
    out of memory leaves an engine that cannot continue."""
    config = config.model_copy(deep=True)
    config.train = config.train.model_copy(update={"micro_batch": batch, "global_batch": batch})
    training = None
    try:
        training = our_training(config)
        training.step()
        torch.cuda.reset_peak_memory_stats()
        training.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved()
    except (torch.OutOfMemoryError, UserError):  # the latter while layers are recorded
        return None
    finally:
        if training is not None:
            training.end()
        del training
        gc.collect()
        torch.cuda.empty_cache()
