"""The fused Mamba-2 layer split over ranks that share a norm's group, on CPUs, in Triton's interpreter.

Run and skipped as tests/ops/test_mamba2_interpreted.py. Each rank compares with the whole layer's reference in float64.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_taipan.model import mamba2
from megatron_taipan.model.build import Build
from megatron_taipan.model.context import make_context
from megatron_taipan.model.stream import Stream
from megatron_taipan.ops.dispatch import pick_ops
from megatron_taipan.ops.fast import load_mamba2_mix
from megatron_taipan.parallel.counter import CommCounter
from megatron_taipan.parallel.groups import build_groups
from megatron_taipan.parallel.mesh import Mesh
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.parameters import parameter_table, take_shard
from tests.distributed.launch import launch, same_packages
from tests.model.small import small_config, told
from tests.ops.devices import interpreted_only
from tests.ops.kernel_checks import error

pytestmark = [
    pytest.mark.slow,
    interpreted_only,
]
pytest.importorskip("triton")

BATCH, LENGTH, WIDTH = 2, 67, 32


def compare_with_the_whole(n_groups: int) -> tuple[dict[str, float], list[bool], CommCounter, CommCounter]:
    """Errors by name, whether each call of the fused operation had a norm to share, and what was sent: fused, plain."""
    size, rank = dist.get_world_size(), dist.get_rank()
    place = build_groups(Mesh(tensor=size)).tensor
    config = small_config("M", d_model=WIDTH, mamba={"d_state": 16, "headdim": 16, "n_groups": n_groups})
    table, calls = parameter_table(config, size), []

    def mix(*args, **options):
        calls.append(options["reduce_sum"] is not None)
        return load_mamba2_mix()(*args, **options)

    def layer(tp: TensorParallel, **ops) -> mamba2.Mamba2:
        build = Build(config, parameter_table(config, tp.size), 1, tp, replace(pick_ops("reference"), **ops))
        return mamba2.Mamba2(build, "layers.0.mixer")

    def shard(name: str, full: torch.Tensor) -> torch.Tensor:
        return take_shard(full, table[f"layers.0.mixer.{name}"], size, rank)

    other = replace(place, counter=CommCounter())
    whole, fused, plain = layer(TensorParallel()).double(), layer(place, mamba2_mix=mix), layer(other)
    mamba2.takes_kernels = lambda x: True
    torch.manual_seed(0)
    for name, parameter in whole.named_parameters():
        parameter.data += torch.randn_like(parameter) * 0.1  # the norm's weight and D are no longer ones
        for part in (fused, plain):
            part.get_parameter(name).data.copy_(shard(name, parameter.data))
    u, upstream = torch.randn(2, BATCH, LENGTH, WIDTH)
    seq_idx = (torch.rand(BATCH, LENGTH) < 0.05).cumsum(1).int()
    ctx = make_context(torch.zeros(BATCH, LENGTH), seq_idx, None, 0, told())

    results = []
    for part in (whole, fused, plain):
        mine = u.to(part.D.dtype, copy=True).requires_grad_()
        out = part(Stream(mine), lambda h, *_: (h, h), ctx).branch
        out.backward(upstream.to(out.dtype))
        results.append({"out": out, "u": mine.grad} | {name: p.grad for name, p in part.named_parameters()})
    expected = {name: t if name in ("out", "u") else shard(name, t) for name, t in results[0].items()}
    errors = {name: error(results[1][name], t) for name, t in expected.items()}
    return errors, calls, place.counter, other.counter


@pytest.mark.parametrize(
    ("ranks", "n_groups"),
    [
        (2, 1),  # the presets' single group
        (4, 2),  # two groups of two ranks
    ],
)
def test_split_layer_is_the_whole_one(ranks, n_groups):
    for errors, calls, fused, plain in launch(ranks, compare_with_the_whole, n_groups, env=same_packages()):
        assert calls == [True]
        assert len(errors) == 18 and all(e < 4e-5 for e in errors.values()), errors
        assert (fused.calls, fused.bytes) == (plain.calls, plain.bytes)
