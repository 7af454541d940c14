"""`python -m megatron_taipan.evaluation latency MODEL ... [--preset NAME ...]`: time and memory by length of context.

    python -m megatron_taipan.evaluation latency runs/mine --contexts 1K,4K,...,64K --out results
    python -m megatron_taipan.evaluation latency --preset taipan_1.3b mamba2_1.3b --contexts 1K,4K,...,1M --out results

For any pattern: seconds to prefill a context in chunks, milliseconds of each token decoded after it, and memory. Tokens
are random ids. `--preset` takes the network of a preset (or of a YAML file) with random weights; its gates are set to
select their capacity, as trained ones do, both for the prefill and at each context. A context that does not fit is a
row that says so. One row is prefilled, and its cache repeated for a batch.

The cache's size follows from its tensors' shapes. Peak memory is what torch allocated on a GPU while it prefilled and
decoded, weights included. `--random-cache` fills the cache with random numbers instead of reading a text: decoding
takes the same time, since that depends on how many keys there are and not on what they hold; nothing is prefilled then.
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_taipan.config_loading import load_config, presets
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.decode_timing import (
    cache_bytes,
    fill_randomly,
    fork_cache,
    make_room,
    settle_for_prefill,
    settle_gates,
    time_decode,
    time_prefill,
)
from megatron_taipan.evaluation.fits import lacks_memory, new_peak, peak_bytes
from megatron_taipan.evaluation.lengths import length_name, parse_length, parse_lengths
from megatron_taipan.evaluation.results import Row, make_folder, write_results
from megatron_taipan.inference.generation import usual_chunk
from megatron_taipan.inference.loading import DTYPES, load_model, parse_device
from megatron_taipan.inference.stepping import Stepper
from megatron_taipan.model.cache import Cache
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops
from megatron_taipan.parallel.processes import on_one_process
from megatron_taipan.programs import exits_cleanly

MOST_WARM = 1024  # steps before the timed ones; buffers that grow are given room for them
OTHER_STEPS = 256  # and for those that set the gates and count what they select
COLUMNS = (  # after the model and the context; None where nothing was measured
    "prefill s", "prefill tokens/s", "ms a token", "mean ms", "tokens/s", "selected", "cache bytes",
    "peak bytes", "note",
)  # fmt: skip


@on_one_process
@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_taipan.evaluation latency", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("models", nargs="*", type=Path, help="checkpoints, runs' folders or exported folders")
    parser.add_argument("--preset", nargs="+", action="extend", default=[], help="presets, or YAML files")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="options of the presets")
    parser.add_argument("--contexts", default="1K,4K,16K", help="such as 1K,4K,16K or 1K,4K,...,1M (K is 1024)")
    parser.add_argument("--batch", type=int, default=1, help="rows that are decoded together")
    parser.add_argument("--chunk", help="tokens of a prefill pass; bounds the memory; default: 2K, on a GPU 8K")
    parser.add_argument("--steps", type=int, default=32, help="decoded tokens that are timed")
    parser.add_argument("--warm", type=float, help="seconds of decoding before them; default: 6 on a GPU, else 0.5")
    parser.add_argument("--random-cache", action="store_true", help="do not prefill: time decoding alone")
    parser.add_argument("--ops", choices=("auto", "fast", "reference"), default="auto", help="kernels of the presets")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder for latency.json, .md and pictures")
    options = parser.parse_args(arguments)
    for name in ("batch", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)} must be at least 1")
    if not options.models and not options.preset:
        raise UserError("nothing to time: name a checkpoint or an export, or --preset NAME")
    device = parse_device(options.device)
    options.dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if options.warm is None:
        options.warm = 6.0 if device.type == "cuda" else 0.5
    contexts = parse_lengths(options.contexts)
    chunk = parse_length(options.chunk) if options.chunk else usual_chunk(device)
    make_folder(options.out)

    rows: list[Row] = []
    heads = f"{'prefill s':>10} {'ms a token':>11} {'selected':>9} {'cache MiB':>10} {'peak MiB':>9}"
    print(f"{'model':<32} {'context':>8} {heads}")
    for label, source in [*((str(p), p) for p in options.models), *((name, name) for name in options.preset)]:
        model = _open(source, options, device)
        trained = isinstance(source, Path)
        for row in tqdm(_by_context(model, contexts, chunk, trained, options), label, len(contexts), leave=False):
            rows.append({"model": label, "weights": "trained" if trained else "random", **row})
            tqdm.write(_line(rows[-1]), file=sys.stdout)
        del model
        _free()
    if options.out is not None:
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        contents = "random numbers, nothing prefilled" if options.random_cache else "prefilled with random tokens"
        about = {
            "device": name, "dtype": options.dtype, "batch": options.batch, "chunk": chunk,
            "timed steps": options.steps, "cache": contents,
        }  # fmt: skip
        if options.preset:
            about["options of the presets"] = " ".join(options.set) or "as they are"
        _write(options.out, rows, about)
    return 0


def _open(source: Path | str, options: argparse.Namespace, device: torch.device) -> Taipan:
    """The network on its device, in evaluation mode: trained weights of a path, random ones of a preset's name."""
    dtype = DTYPES[options.dtype]
    if isinstance(source, Path):
        return load_model(source, dtype)[0].to(device)
    file = Path(source) if source.endswith(".yaml") else presets() / f"{source}.yaml"
    if not file.is_file():
        raise UserError(f"no preset {source}; they are {', '.join(sorted(p.stem for p in presets().glob('*.yaml')))}")
    config = load_config(file, options.set).model
    with device:
        model = Taipan(config, ops=pick_ops(options.ops)).requires_grad_(False)
    return (model.bfloat16() if dtype == torch.bfloat16 else model).eval()


@torch.inference_mode()
def _by_context(
    model: Taipan, contexts: list[int], chunk: int, trained: bool, options: argparse.Namespace
) -> Iterator[Row]:
    """A row for each context, the shortest first."""
    device = next(model.parameters()).device
    document = torch.randint(0, model.config.vocab_size, (1, contexts[-1]), device=device)
    cache, seconds, failed = model.new_cache(1), 0.0, ""
    for context in contexts:
        row: Row = {"context": context, **dict.fromkeys(COLUMNS)}
        row["cache bytes"] = cache_bytes(model, context, options.batch)
        if failed:
            yield row | {"note": f"not tried: {failed} did not fit"}
            continue
        gc.collect()  # the row before's cache must not count in this one's peak
        try:
            if context == contexts[0] and not options.random_cache:  # compiles kernels, outside of the times
                _prepare(model, document, contexts, chunk, trained)
            make_room(cache, context + MOST_WARM + OTHER_STEPS + options.steps)
            if options.random_cache:
                fill_randomly(cache, context)
            else:
                if not trained:
                    settle_for_prefill(model, document[:, : min(chunk, contexts[0])])
                new_peak(device)
                new = context - cache.length
                ms = time_prefill(model, cache, document[:, cache.length : context], chunk)
                seconds += ms / 1e3
                row |= {"prefill s": round(seconds, 4), "prefill tokens/s": round(new / ms * 1e3)}
                row["peak bytes"] = peak_bytes(device)
            if not trained:
                settle_gates(model, cache)  # by many rows: more memory than one that decodes
            new_peak(device)
            row |= _decode(model, cache, options)
            if (peak := peak_bytes(device)) is not None:
                row["peak bytes"] = max(row["peak bytes"] or 0, peak)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            failed = length_name(context)
            row["note"] = "out of memory"
        if failed:
            cache = Cache([])  # what it held may be needed for the next model
            _free()
        yield row


def _prepare(model: Taipan, document: torch.Tensor, contexts: list[int], chunk: int, trained: bool) -> None:
    """Prefills a cache that nobody needs with chunks of the sizes to come."""
    if not trained:
        settle_for_prefill(model, document[:, : min(chunk, contexts[0])])
    once = model.new_cache(1)
    time_prefill(model, once, document[:, : min(2 * chunk, contexts[-1])], chunk)


def _decode(model: Taipan, prefilled: Cache, options: argparse.Namespace) -> dict[str, Any]:
    """The columns on decoding after a context."""
    stepper = Stepper(model, fork_cache(prefilled, options.batch))
    found = time_decode(model, stepper, options.batch, options.steps, warm_s=options.warm, most_warm=MOST_WARM)
    return {
        "ms a token": round(found.ms, 4), "mean ms": round(found.mean_ms, 4),
        "tokens/s": round(options.batch / found.ms * 1e3, 1), "selected": found.selected,
    }  # fmt: skip


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _line(row: Row) -> str:
    """A row of the printed table."""

    def cell(name: str, width: int, digits: int, scale: float = 1) -> str:
        return f"{'–' if row[name] is None else f'{row[name] / scale:,.{digits}f}':>{width}}"

    numbers = [cell("prefill s", 10, 2), cell("ms a token", 11, 3), cell("selected", 9, 3)]
    numbers += [cell("cache bytes", 10, 1, 1 << 20), cell("peak bytes", 9, 0, 1 << 20)]
    note = f"  {row['note']}" if row["note"] else ""
    return f"{row['model']:<32} {length_name(row['context']):>8} {' '.join(numbers)}{note}"


def _write(folder: Path, rows: list[Row], about: dict[str, Any]) -> None:
    from megatron_taipan.evaluation.figures import curves_of, write_curves

    write_results(folder, "latency", rows, about=about, title="Latency and memory by length of the context")
    memory = [row | {"MiB": row["cache bytes"] / (1 << 20)} for row in rows]
    for name, column, words, some in (
        ("latency", "ms a token", "milliseconds a decoded token", rows),
        ("latency_prefill", "prefill s", "seconds of prefill", rows),
        ("latency_memory", "MiB", "cache, MiB", memory),
    ):
        if curves := curves_of(some, "context", column):
            write_curves(
                folder / f"{name}.svg", curves, x="tokens of context", y=words, log_x=True, log_y=name != "latency"
            )


if __name__ == "__main__":
    sys.exit(main())
