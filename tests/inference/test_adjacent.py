"""Weights that are read together, moved next to each other: nothing about the model changes but its launches."""

import copy

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from megatron_taipan.inference.adjacent import make_adjacent
from megatron_taipan.model.fused_params import adjoin, products
from tests.inference.networks import VOCABULARY, small_model


def groups(model):
    """The parameters of each group that the modules name."""
    found = [(module, names) for module in model.modules() for names in getattr(module, "read_together", ())]
    return [tuple(getattr(module, name) for name in names) for module, names in found]


def logits(model) -> torch.Tensor:
    tokens = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2)
    with torch.no_grad():
        first = model(tokens[:, :5], cache=cache).logits[:, -1]
        return torch.stack([first, *(model.step(tokens[:, at : at + 1], cache) for at in range(5, 8))])


@pytest.mark.parametrize("inside", [False, True])
def test_values_and_names_stay_and_steps_read_one_matrix(inside):
    with torch.inference_mode(inside):
        model = small_model("M S W A").requires_grad_(False)
        before, expected = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
        assert groups(model) and not any(map(adjoin, groups(model)))
    with torch.inference_mode():
        make_adjacent(model)
    assert all(map(adjoin, groups(model)))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    places = [part.data_ptr() for parts in groups(model) for part in parts]
    make_adjacent(model)
    assert places == [part.data_ptr() for parts in groups(model) for part in parts]


def test_no_more_memory_is_held_than_before():
    """The parts' own memory is let go: every storage holds its parameters and nothing else."""
    model = small_model("M S").requires_grad_(False)
    make_adjacent(model)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    assert sum(storages.values()) == sum(t.nbytes for t in model.state_dict().values())


def test_what_trains_stays_where_it_is():
    model = small_model("M S")
    before = [part.data_ptr() for part in model.parameters()]
    make_adjacent(model)
    assert before == [part.data_ptr() for part in model.parameters()]
    model.requires_grad_(False)
    model.layers[0].mixer.in_proj_B.requires_grad_()
    make_adjacent(model)
    moved = [adjoin(parts) for parts in groups(model)]
    assert moved == [False, True, True, True]


def test_what_layers_share_is_left_where_it_is():
    """It cannot adjoin in both; moved again by every call, it would leave recorded steps without their weights."""
    model = small_model("M M A", attention={"n_heads": 2, "n_kv_heads": 2, "head_dim": 6, "window": 6})
    model.requires_grad_(False)
    model.layers[1].mixer.in_proj_x = model.layers[0].mixer.in_proj_x
    model.layers[2].attention.v_proj = model.layers[2].attention.k_proj
    before, expected = [part.data_ptr() for parts in groups(model) for part in parts], logits(model)
    assert make_adjacent(model)
    assert [adjoin(parts) for parts in groups(model)] == [False, True, True, False, True, True, False]
    after = [part.data_ptr() for parts in groups(model) for part in parts]
    assert before[:5] == after[:5] and before[-3:] == after[-3:]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    assert not make_adjacent(model)


def test_tensors_of_inference_mode_are_not_mixed_with_others():
    model = small_model("M").requires_grad_(False)
    with torch.inference_mode():
        weight = model.layers[0].mixer.in_proj_z
        model.layers[0].mixer.in_proj_z = torch.nn.Parameter(weight.clone(), requires_grad=False)
    make_adjacent(model)
    assert [part.is_inference() for part in groups(model)[0]] == [True, False, False, False, False]


def test_each_has_a_storage_of_its_own_in_a_state_dict(tmp_path):
    """As accelerate tells tensors apart; what it takes for one tensor it saves once."""
    model = small_model("M S").requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    make_adjacent(model)
    for found in (model.state_dict(), copy.deepcopy(model).state_dict(), torch.nn.Sequential(model).state_dict()):
        storages = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in found.values()}
        assert len(storages) == len(before)
    weight = model.layers[0].mixer.in_proj_x
    assert model.state_dict()["layers.0.mixer.in_proj_x"].data_ptr() == weight.data_ptr()  # the same memory
    save_model(model, tmp_path / "x.safetensors")
    other = small_model("M S", init_std=0.3)
    assert load_model(other, tmp_path / "x.safetensors") == (set(), [])
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("bias", [True, False])
def test_what_was_moved_is_saved_copied_and_cast_as_before(tmp_path, bias):
    mamba = {"d_state": 8, "headdim": 8, "n_groups": 2, "chunk_size": 5, "conv_bias": bias}
    model = small_model("M S", mamba=mamba).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    make_adjacent(model)
    save_file(model.state_dict(), tmp_path / "x.safetensors")  # it refuses tensors that overlap
    torch.save(model.state_dict(), tmp_path / "x.pt")
    copied = copy.deepcopy(model).state_dict()
    for found in (load_file(tmp_path / "x.safetensors"), torch.load(tmp_path / "x.pt"), copied):
        assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    cast = model.float().state_dict()
    assert all(torch.equal(cast[name], before[name].float()) for name in before)


def test_transformers_saves_what_was_moved(tmp_path):
    from megatron_taipan.hf import TaipanConfig, TaipanForCausalLM

    network = small_model("M S").config.model_dump(mode="json")
    model = TaipanForCausalLM(TaipanConfig(network=network)).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    make_adjacent(model)
    assert adjoin(groups(model)[1])  # the convolution's; the projections are in modules
    model.save_pretrained(tmp_path)
    after = TaipanForCausalLM.from_pretrained(tmp_path).state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_products_of_modules_and_of_matrices_apart():
    torch.manual_seed(0)
    u, a, b = torch.randn(2, 1, 6), torch.nn.Linear(6, 3, bias=False), torch.nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        expected = torch.cat([a(u), b(u)], -1)
        assert torch.equal(products(u, a, b), expected) and torch.equal(products(u, a.weight, b), expected)
        flat = torch.cat([a.weight, b.weight])
        torch.testing.assert_close(products(u, flat[:3], flat[3:]), expected)


def test_compiled_products_copy_no_weights():
    """There nothing is known of addresses, and to join few tokens' products is cheaper than to join the weights."""
    u, flat, seen = torch.randn(2, 1, 6), torch.randn(7, 6), []

    def record(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    got = torch.compile(lambda u: products(u, flat[:3], flat[3:]), backend=record)(u)
    torch.testing.assert_close(got, u @ flat.t())
    assert seen.count(torch.nn.functional.linear) == 2, seen
