"""Times of prefill and decoding by length of the context, on a GPU by its own clock, on a CPU by the host's.

One row is prefilled; each measurement goes on from a fork of its cache, so that the next longer context needs only the
tokens that are new.
"""

import copy
import itertools
import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_taipan.evaluation.calibrate import calibrate
from megatron_taipan.inference.selection_watch import gated_blocks
from megatron_taipan.inference.stepping import EAGER_STEPS, Stepper
from megatron_taipan.layer_kinds.registry import kinds_of
from megatron_taipan.model.cache import Cache, KeyValueStore
from megatron_taipan.model.gate import Gate
from megatron_taipan.model.taipan import Taipan

SHARE_ROWS = 64  # decoded tokens of which the share selected is taken


class Decoding(NamedTuple):
    """Steps of one more token a row."""

    ms: float  # median milliseconds of a step
    mean_ms: float  # the mean, which holds the rare moves of a window's buffer
    selected: float | None  # share of the rows that the gates selected in steps before; None without gates


def time_prefill(model: Taipan, cache: Cache, tokens: Tensor, chunk: int) -> float:
    """Milliseconds to extend the cache by [1, l] tokens, in chunks."""
    wait_for(tokens.device)
    began = time.perf_counter()
    for part in tokens.split(chunk, 1):
        model(part, cache=cache, all_logits=False)
    wait_for(tokens.device)
    return (time.perf_counter() - began) * 1e3


def time_decode(
    model: Taipan, stepper: Stepper, batch: int, steps: int, *, warm_s: float, most_warm: int | None = None
) -> Decoding:
    """Times `steps` steps of random tokens after some that are not timed.

    Args:
        warm_s: seconds of decoding before the first timed step; the clock rate of a GPU under load differs from that at
            rest.
        most_warm: steps of these at most; None: no bound.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.vocab_size
    some = torch.randint(0, vocabulary, (max(1, SHARE_ROWS // batch), batch, 1), device=device)
    selected = selected_share(model, stepper.cache, some)
    tokens = torch.randint(0, vocabulary, (steps, batch, 1), device=device)
    began, warmed = time.perf_counter(), 0
    while warmed <= EAGER_STEPS or (time.perf_counter() - began < warm_s and (most_warm is None or warmed < most_warm)):
        stepper.step(tokens[0])
        wait_for(device)
        warmed += 1
    times = sorted(_step_times(stepper, tokens))
    return Decoding(times[len(times) // 2], sum(times) / steps, selected)


def _step_times(stepper: Stepper, tokens: Tensor) -> list[float]:
    """Milliseconds of each step, tokens [steps, b, 1]; on a GPU nothing waits for it between them."""
    if tokens.is_cuda:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(tokens) + 1)]
        events[0].record()
        for token, event in zip(tokens, events[1:], strict=True):
            stepper.step(token)
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    marks = [time.perf_counter()]
    for token in tokens:
        stepper.step(token)
        marks.append(time.perf_counter())
    return [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]


def fork_cache(prefilled: Cache, batch: int = 1) -> Cache:
    """A cache that goes on from one prefilled row, in every row of a batch, and leaves that one as it is.

    For one row, buffers that grow with the text are shared: a fork writes behind the tokens of the prefilled row. So
    only one fork is used at a time, and it ends where the prefilled row goes on.
    """
    layers = [copy.copy(layer) if _grows(layer) else copy.deepcopy(layer) for layer in prefilled.layers]
    cache = replace(prefilled, layers=layers, position=None)
    if batch > 1:
        cache.select(torch.zeros(batch, dtype=torch.int64, device=cache.layers[0].tensors()[0].device))
    return cache


def make_room(cache: Cache, tokens: int) -> None:
    """Lets the buffers that grow hold that many tokens, exactly: by themselves they double."""
    for layer in cache.layers:
        if isinstance(layer, KeyValueStore):
            layer.grow(tokens)


def fill_randomly(cache: Cache, length: int) -> None:
    """Makes an empty cache one of `length` tokens with random contents.

    A step's work depends on how many keys a query sees, not on what they hold; only a gate's share of selected tokens
    depends on that, and `settle_gates` sets it.
    """
    make_room(cache, length)
    for layer in cache.layers:
        for tensor in layer.tensors():
            tensor.normal_()
        if isinstance(layer, KeyValueStore):
            layer.used = length if layer.window is None else min(length, layer.window - 1)
            layer.first = length - layer.used
    some = cache.layers[0].tensors()[0]
    cache.length = length
    cache.last_seq_idx = torch.zeros(len(some), dtype=torch.int32, device=some.device)
    cache.document_start = torch.zeros(len(some), dtype=torch.int64, device=some.device)


def cache_bytes(model: Taipan, context: int, batch: int = 1) -> int:
    """What the cache of so many tokens takes, from its tensors' shapes: none is made."""
    return sum(cache_bytes_by_layer(model, context, batch))


def cache_bytes_by_layer(model: Taipan, context: int, batch: int = 1) -> list[int]:
    """The same layer by layer."""
    found = []
    for layer in model.new_cache(batch, device="meta").layers:
        sizes = [(t.numel() * t.element_size(), t.shape[1]) for t in layer.tensors()]  # [b, tokens, ...] where it grows
        found.append(sum(size // held * context if _grows(layer) else size for size, held in sizes))
    return found


def settle_for_prefill(model: Taipan, tokens: Tensor) -> None:
    """Sets the thresholds of untrained gates so that they select their capacity of [1, l] tokens."""
    if steerable(model):
        calibrate(model, [{"tokens": tokens, "seq_idx": None}])  # one document


def settle_gates(model: Taipan, prefilled: Cache) -> None:
    """Sets each gate's threshold so that it selects its capacity of decoded tokens, from the first layer on: what one
    layer selects changes what the next one sees."""
    if not steerable(model):
        return
    alone = any(kind.growing for kind in kinds_of(model.config.letters))  # a batch would hold its buffers that often
    batch, steps = (1, 128) if alone else (32, 4)
    device = next(model.parameters()).device
    for gate in gates_of(model):
        cache = fork_cache(prefilled, batch)
        margins: list[Tensor] = []
        hook = gate.register_forward_hook(lambda _, __, out, into=margins: into.append(out.margin.flatten()))
        for token in torch.randint(0, model.config.vocab_size, (steps, batch, 1), device=device):
            model.step(token, cache)
        hook.remove()
        gate.threshold.copy_(torch.cat(margins).float().quantile(1 - model.config.gate.final_capacity))


def selected_share(model: Taipan, cache: Cache, tokens: Tensor) -> float | None:
    """Decodes tokens [steps, b, 1], launched kernel by kernel; the share of them that the gates selected."""
    if not gates_of(model):
        return None
    shares: list[Tensor] = []
    hooks = [
        gate.register_forward_hook(lambda _, __, out: shares.append(out.selected.float().mean()))
        for gate in gates_of(model)
    ]
    for token in tokens:
        model.step(token, cache)
    for hook in hooks:
        hook.remove()
    return round(torch.stack(shares).mean().item(), 3)


def gates_of(model: Taipan) -> list[Gate]:
    """The gates, in the order of their layers."""
    return [block.gate for block in gated_blocks(model)]


def steerable(model: Taipan) -> bool:
    """Whether there are gates, and thresholds decide what they select."""
    return bool(gates_of(model)) and model.config.gate.noise != "random"


def wait_for(device: torch.device) -> None:
    """Lets the host wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _grows(layer: object) -> bool:
    return isinstance(layer, KeyValueStore) and layer.window is None
