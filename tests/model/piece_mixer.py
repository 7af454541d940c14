"""A Mamba-2 layer over pieces of its rows, by kernels and by references, against the whole layer in one process."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.model import mamba2
from megatron_taipan.model.build import Build
from megatron_taipan.model.context import make_context
from megatron_taipan.model.recompute import recompute_of
from megatron_taipan.model.stream import Stream
from megatron_taipan.ops.dispatch import pick_ops
from megatron_taipan.ops.fast import load_mamba2_mix
from megatron_taipan.parallel.counter import CommCounter
from megatron_taipan.parallel.groups import build_groups
from megatron_taipan.parallel.mesh import Mesh
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.parameters import parameter_table, take_shard
from tests.model.small import small_config, told
from tests.ops.kernel_checks import error

BATCH = 2


class Setting(NamedTuple):
    """What is compared: the cases of `cuts_of`, on pieces of `length` tokens."""

    tensor: int  # ranks that split the heads; the others hold pieces
    length: int
    cases: list[int]
    segmented: bool = False  # the scan cuts each piece in two
    recompute: str = "none"
    dtype: torch.dtype = torch.float32
    width: int = 32
    headdim: int = 16
    d_state: int = 16


def cuts_of(length: int, pieces: int) -> list[list[list[int]] | None]:
    """Where documents begin in each of the two rows, case by case: on, before and after the borders; None: nowhere."""
    borders = [length * piece for piece in range(1, pieces)]
    return [
        None,
        [borders, [b - 1 for b in borders]],
        [[b - 2 for b in borders], [b + 1 for b in borders]],
        [[borders[0] + 2], []],  # the second row is one document
        [[3, borders[0] - 3, borders[-1] + length // 2], [borders[-1] - 1, borders[-1]]],
    ]


def two_segments(b: int, heads: int, n_chunks: int) -> tuple[int, int]:
    per_segment = -(-n_chunks // 2)
    return -(-n_chunks // per_segment), per_segment


def compare_pieces(setting: Setting) -> list[Any]:
    """For each case: errors by name of the fused layer, of the layer op by op, and of the fused layer on one process,
    all against float64 on one process; and calls and bytes of the first two."""
    tensor, length, dtype = setting.tensor, setting.length, setting.dtype
    pieces = dist.get_world_size() // tensor
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    groups = build_groups(Mesh(tensor=tensor, context=pieces))
    place, own_tensor, calls = groups.context, groups.tensor, 0
    mamba = {"d_state": setting.d_state, "headdim": setting.headdim, "n_groups": 1, "chunk_size": 64}
    config = small_config("M", d_model=setting.width, mamba=mamba)
    table = parameter_table(config, tensor)

    def mix(*args, **options):
        nonlocal calls
        calls += 1
        return load_mamba2_mix()(*args, **options)

    def layer(tp: TensorParallel, mine, mix) -> mamba2.Mamba2:
        build = Build(config, parameter_table(config, tp.size), 1, tp, replace(pick_ops("reference"), mamba2_mix=mix))
        return mamba2.Mamba2(replace(build, place=mine), "layers.0.mixer")

    def shard(name: str, full: Tensor) -> Tensor:
        return take_shard(full, table[f"layers.0.mixer.{name}"], tensor, own_tensor.rank)

    mamba2.takes_kernels = lambda x: x.dtype != torch.float64
    other = replace(place, counter=CommCounter())
    whole = layer(TensorParallel(), None, None).double()
    alone = layer(TensorParallel(), None, mix)
    fused, plain = layer(own_tensor, place, mix), layer(own_tensor, other, None)
    torch.manual_seed(0)
    for parameter in whole.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1  # the norm's weight and D are no longer ones
    whole.dt_bias.data = torch.rand_like(whole.dt_bias) * 3 - 6  # steps so small that states reach over several pieces
    for name, parameter in whole.named_parameters():
        alone.get_parameter(name).data.copy_(parameter.data)
        for part in (fused, plain):
            part.get_parameter(name).data.copy_(shard(name, parameter.data))
    u, upstream = torch.randn(2, BATCH, length * pieces, setting.width)
    layers = [whole] + [m.to(device) if dtype == torch.float32 else m.to(device, dtype) for m in (alone, fused, plain)]
    mine = slice(place.rank * length, (place.rank + 1) * length)

    def outcome(module: mamba2.Mamba2, ctx, rows: slice) -> dict[str, Tensor]:
        at, kind = ("cpu", torch.float64) if module is whole else (device, dtype)
        x = u[:, rows].to(at, kind, copy=True).requires_grad_()
        module.zero_grad()
        again = recompute_of(setting.recompute, 1, own_tensor) if module is fused else None
        given = Stream(x), lambda h, *_: (h, h), ctx  # a norm that does nothing
        out = (module(*given) if again is None else again.run(module, *given)).branch
        out.backward(upstream[:, rows].to(at, kind))
        grads = {name: p.grad for name, p in module.named_parameters()}
        if module.place is not None:
            for grad in grads.values():
                dist.all_reduce(grad, group=place.group)
        return {"out": out.detach().cpu(), "u": x.grad.cpu()} | {name: g.cpu() for name, g in grads.items()}

    segmenting = ["megatron_taipan.ops.ssd_forward_triton", "megatron_taipan.ops.ssd_backward_triton"]
    found = []
    for cuts in (cuts_of(length, pieces)[case] for case in setting.cases):
        seq_idx = None
        if cuts is not None:
            seq_idx = torch.zeros(BATCH, length * pieces, dtype=torch.int32)
            for row, begins in enumerate(cuts):
                seq_idx[row, begins] = 1
            seq_idx = seq_idx.cumsum(1).int()
        start = make_context(u[..., 0], seq_idx, None, 0, told()).document_start[:, mine.start]
        result = []
        for module in layers:
            at = torch.device("cpu") if module is whole else device
            rows, mesh_place = (mine, place) if module.place is not None else (slice(None), None)
            ctx = make_context(
                u[:, rows, 0].to(at), None if seq_idx is None else seq_idx[:, rows].to(at), None, 0, told(),
                place=mesh_place, document_start=None if mesh_place is None else start.to(at),
            )  # fmt: skip
            patches = [mock.patch(f"{path}.segments", two_segments) for path in segmenting] if setting.segmented else []
            before = calls
            with patches[0] if patches else nullcontext(), patches[1] if patches else nullcontext():
                result.append(outcome(module, ctx, rows))
            assert (calls > before) == (module in (alone, fused)), "which layers the fused operation computed"
        exact, one, *parted = result
        cut = {n: t[:, mine] if n in ("out", "u") else shard(n, t) for n, t in exact.items()}
        errors = [{name: error(part[name], cut[name]) for name in cut} for part in parted]
        errors.append({name: error(one[name], exact[name]) for name in exact})
        found.append((*errors, (place.counter.calls, place.counter.bytes), (other.counter.calls, other.counter.bytes)))
    return found


def compare_replays(recompute: str) -> list[bool]:
    """On GPUs: whether a network over pieces gives the same bits replayed as CUDA graphs as one by one, micro-batch by
    micro-batch with other documents in each: the loss, then every gradient."""
    from megatron_taipan.model.taipan import Taipan
    from megatron_taipan.model_config import ModelConfig
    from tests.model.replays import watched_passes
    from tests.model.test_graphs_gpu import CONFIG, batch

    place = build_groups(Mesh(context=dist.get_world_size())).context
    length = 200 // place.size
    mine = slice(place.rank * length, (place.rank + 1) * length)

    def made() -> Taipan:
        with torch.device("cuda"):
            network = Taipan(ModelConfig.model_validate(CONFIG), seed=1, context_parallel=place, recompute=recompute)
        return network.bfloat16()

    def outcome(model: Taipan, number: int) -> list[Tensor]:
        model.zero_grad()
        whole = batch(number)
        ctx = make_context(whole["tokens"], whole["seq_idx"], None, 0, told())
        piece = {n: t[:, mine] if n in ("tokens", "labels", "seq_idx") else t for n, t in whole.items()}
        loss = model(**piece, document_start=ctx.document_start[:, mine.start], ce_scale=1e-3).loss
        loss.backward()
        return [t.detach().clone() for t in (loss, *(p.grad for p in model.parameters()))]

    plain, graphed = made(), made()
    graphed.capture(2, length)
    same = []
    with watched_passes() as passes:
        for number in (1, 2, 3):
            same += [torch.equal(a, b) for a, b in zip(outcome(plain, number), outcome(graphed, number), strict=True)]
    assert passes.replayed == passes.one_by_one == [(2, length)] * 3 and passes.launches > 0, passes
    graphed.release_graphs()
    return same
