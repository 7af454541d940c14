"""Decoding on a GPU, with the kernels that run there, gives what the references give on the CPU."""

import pytest
import torch

from megatron_taipan.inference.generation import generate
from megatron_taipan.inference.stepping import Stepper
from megatron_taipan.model.fused_params import adjoin
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops
from tests.inference.networks import VOCABULARY, small_config

# sizes that the kernels take: powers of two from 16 on
SIZES = {
    "d_model": 64,
    "d_ff": 128,
    "init_std": 0.1,
    "mamba": {"d_state": 16, "headdim": 16, "chunk_size": 64},
    "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "window": 48},
}


def pair(pattern: str) -> tuple[Taipan, Taipan]:
    """The same float32 weights: references on the CPU, whatever runs fastest on the GPU."""
    config = small_config(pattern, **SIZES)
    return (
        Taipan(config, seed=1, ops=pick_ops("reference")).eval(),
        Taipan(config, seed=1, ops=pick_ops("auto")).cuda().eval(),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["M", "S", "W", "A", "M S W M A"])
def test_chunked_prefill_and_steps_of_packed_rows_equal_the_cpu_forward(pattern):
    cpu, gpu = pair(pattern)
    tokens = torch.randint(0, VOCABULARY, (3, 230), generator=torch.Generator().manual_seed(0))
    seq_idx = torch.zeros(3, 230, dtype=torch.int32)
    seq_idx[0, 17:] = 1  # left padding
    seq_idx[1, 64:] = 1  # a document that ends with a chunk of the scan
    seq_idx[2, 90:] = 1
    seq_idx[2, 201:] = 2
    cache = gpu.new_cache(3)
    parts = []
    with torch.inference_mode():
        wanted = cpu(tokens, seq_idx=seq_idx).logits
        for start, end in [(0, 70), (70, 71), (71, 199), *((at, at + 1) for at in range(199, 230))]:
            chunk = tokens[:, start:end].cuda(), seq_idx[:, start:end].cuda()
            parts.append(gpu(chunk[0], seq_idx=chunk[1], cache=cache).logits.cpu())
    difference = (torch.cat(parts, 1) - wanted).abs().max() / wanted.abs().max()
    assert difference < 5e-3, difference


@pytest.mark.gpu
def test_greedy_text_is_the_same_on_both():
    cpu, gpu = pair("M S W M A")
    prompts = [[1, 2, 3], list(range(40)), [7] * 11]
    assert generate(gpu, prompts, max_new_tokens=20) == generate(cpu, prompts, max_new_tokens=20)


@pytest.mark.gpu
def test_bf16_decoding_stays_near_the_bf16_forward():
    _, gpu = pair("M S W M A")
    gpu.bfloat16()
    tokens = torch.randint(0, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0)).cuda()
    cache = gpu.new_cache(2)
    with torch.inference_mode():
        whole = gpu(tokens).logits
        parts = [gpu(tokens[:, :100], cache=cache).logits]
        parts += [gpu(tokens[:, at : at + 1], cache=cache).logits for at in range(100, 150)]
    # A gate near its threshold may fall either way under bf16, which moves a token's logits: compare the bulk.
    difference = (torch.cat(parts, 1) - whole).abs().amax(-1) / whole.abs().amax(-1)
    assert difference.median() < 0.03 and (difference < 0.2).float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])  # frozen weights that are read together are moved together
@pytest.mark.parametrize("pattern", ["M S W M", "M A"])
def test_a_captured_step_gives_the_very_logits_of_one_that_is_launched(pattern, frozen, dtype):
    """Far beyond the window of 48, so that the buffers are moved (or grow), with rows that leave on the way."""
    gpu = pair(pattern)[1].to(dtype).requires_grad_(not frozen)
    tokens = torch.randint(0, VOCABULARY, (3, 400), generator=torch.Generator().manual_seed(0)).cuda()
    steppers = []
    with torch.inference_mode():
        for captured in (False, True):
            cache = gpu.new_cache(3)
            gpu(tokens[:, :30], cache=cache)
            steppers.append(Stepper(gpu, cache, captured=captured))
        rows, graphs = tokens, {}  # by id; kept, or a later graph could get the id of one that is gone
        for at in range(30, 400):
            if at == 200:
                for stepper in steppers:
                    stepper.cache.select(torch.tensor([2, 0], device="cuda"))
                rows = tokens[[2, 0]]
            eager, replayed = (stepper.step(rows[:, at : at + 1]).clone() for stepper in steppers)
            assert torch.equal(eager, replayed), at
            if steppers[1].graph is not None:
                graphs[id(steppers[1].graph)] = steppers[1].graph
        assert len(graphs) >= 2 and steppers[0].graph is None


@pytest.mark.gpu
def test_steps_equal_the_cpu_forward():
    cpu, gpu = pair("M S W M A")
    gpu.requires_grad_(False)
    tokens = torch.randint(0, VOCABULARY, (2, 200), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        cache = gpu.new_cache(2)
        gpu(tokens[:, :70].cuda(), cache=cache)
        stepper = Stepper(gpu, cache)
        got = torch.stack([stepper.step(tokens[:, at : at + 1].cuda()).cpu() for at in range(70, 200)], 1)
        wanted = cpu(tokens).logits[:, 70:]
    assert (got - wanted).abs().max() / wanted.abs().max() < 5e-3
    assert adjoin(tuple(getattr(gpu.layers[0].mixer, name) for name in gpu.layers[0].mixer.read_together[0]))


@pytest.mark.gpu
def test_a_captured_step_follows_weights_that_move():
    """Moved by the stepper of another cache, cast and cast back, replaced by others."""
    gpu = pair("M S W A")[1]
    other = {name: t * 1.1 for name, t in gpu.state_dict().items()}
    tokens = torch.randint(0, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        steppers = [
            Stepper(gpu, gpu.new_cache(2), captured=captured) for captured in (True, False)
        ]  # the first moves weights
        for at in range(60):  # the captured one first: it moves the weights again
            if at == 10:
                Stepper(gpu.requires_grad_(False), gpu.new_cache(2))
            if at == 20:
                gpu.double().float()
            if at == 30:
                gpu.cpu().cuda()
            if at == 40:
                gpu.load_state_dict(other, assign=True)
            replayed, eager = (stepper.step(tokens[:, at : at + 1]).clone() for stepper in steppers)
            assert torch.equal(eager, replayed), at
            assert at % 10 < 3 or steppers[0].graph is not None
