"""Latency by context: the model's own decoding is timed, for every kind of layer; what does not fit is a row."""

import json

import pytest
import torch

from megatron_taipan.evaluation import decode_timing, latency
from megatron_taipan.evaluation.decode_timing import (
    cache_bytes,
    fill_randomly,
    fork_cache,
    make_room,
    settle_gates,
    time_decode,
    time_prefill,
)
from megatron_taipan.evaluation.latency import main
from megatron_taipan.inference.stepping import Stepper
from megatron_taipan.model.taipan import Taipan
from tests.checkpoint.test_weights import write_weights
from tests.inference.networks import VOCABULARY, small_config, small_model

PATTERNS = ["M M", "M S", "W M", "A A", "M S W A"]


def tokens_of(length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_fork_goes_on_from_the_context_and_leaves_it_as_it_was(pattern, batch):
    model, tokens = small_model(pattern), tokens_of(60)
    cache = model.new_cache(1)
    make_room(cache, 60)
    time_prefill(model, cache, tokens[:, :40], 7)
    fork = fork_cache(cache, batch)
    time_decode(model, Stepper(model, fork_cache(cache)), 1, 3, warm_s=0)  # an earlier one, of other tokens
    for at in range(40, 50):
        logits = model.step(tokens[:, at].expand(batch, 1), fork)
    wanted = model(tokens[:, :50]).logits[:, -1].expand(batch, -1)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-9)
    time_prefill(model, cache, tokens[:, 40:59], 7)
    torch.testing.assert_close(model.step(tokens[:, 59:], cache), model(tokens).logits[:, -1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_caches_size_is_that_of_the_cache(pattern):
    model = small_model(pattern, torch.float32)
    for context, batch in ((300, 1), (900, 2)):
        cache = model.new_cache(batch)
        make_room(cache, context)
        assert cache_bytes(model, context, batch) == cache.n_bytes()
    grows = cache_bytes(model, 2000) - cache_bytes(model, 1000)
    assert grows == pattern.count("A") * 1000 * 2 * 2 * 6 * 4  # keys and values, 2 heads of 6, float32


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_random_cache_has_the_sizes_of_a_prefilled_one(pattern):
    """What a step's work depends on: how many tokens there are, and how many of them a query sees."""
    model, length = small_model(pattern, torch.float32), 40
    real, drawn = model.new_cache(1), model.new_cache(1)
    time_prefill(model, real, tokens_of(length), 8)
    fill_randomly(drawn, length)
    assert real.length == drawn.length
    for layer, other in zip(real.layers, drawn.layers, strict=True):
        assert [t.shape[2:] for t in layer.tensors()] == [t.shape[2:] for t in other.tensors()]
        if hasattr(layer, "used"):
            assert layer.first + layer.used == other.first + other.used == length
            assert other.used == (length if other.window is None else other.window - 1)
    for _ in range(20):
        logits = model.step(tokens_of(1), drawn)
    assert logits.isfinite().all() and drawn.length == length + 20


@pytest.mark.parametrize("pattern", ["M S S", "M S A S"])
def test_untrained_gates_are_set_to_their_capacity(pattern):
    model = small_model(pattern, gate={"capacity": 0.25})
    cache = model.new_cache(1)
    time_prefill(model, cache, tokens_of(50), 50)
    for gate in (layer.gate for layer in model.layers if hasattr(layer, "gate")):
        gate.threshold.fill_(100.0)
    assert time_decode(model, Stepper(model, fork_cache(cache)), 1, 2, warm_s=0).selected == 0
    settle_gates(model, cache)
    assert time_decode(model, Stepper(model, fork_cache(cache)), 1, 2, warm_s=0).selected == pytest.approx(
        0.25, abs=0.2
    )


def test_a_time_is_the_median_and_the_steps_before_do_not_count(monkeypatch):
    model, asked = small_model("M", torch.float32), []
    monkeypatch.setattr(decode_timing, "_step_times", lambda _, tokens: asked.append(tokens.shape) or [9.0, 1.0, 2.0])
    cache = model.new_cache(2)
    found = time_decode(model, Stepper(model, cache), 2, 3, warm_s=60, most_warm=5)
    assert (found.ms, found.mean_ms, found.selected) == (2.0, 4.0, None)
    assert asked == [(3, 2, 1)] and cache.length == 5  # a minute of warming, but five steps at most


def write_preset(path, pattern: str):
    m = small_config(pattern)
    path.write_text(
        f"model: {json.dumps(m.model_dump(mode='json', exclude_defaults=True))}\ndata: {{train: none}}\n"
        "train: {steps: 1, global_batch: 1, micro_batch: 1}\ncheckpoint: {dir: none}\n"
    )
    return str(path)


QUICK = ["--steps", "2", "--warm", "0", "--chunk", "16", "--device", "cpu"]


def test_the_program_compares_models_and_presets(tmp_path, capsys):
    write_weights(tmp_path / "model", Taipan(small_config("A M"), seed=3))
    preset = write_preset(tmp_path / "p.yaml", "M S W")
    arguments = [str(tmp_path / "model"), "--preset", preset, "--contexts", "16,32,...,64", *QUICK]
    assert main([*arguments, "--batch", "2", "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/latency.json").read_text())
    rows = record["rows"]
    assert [(row["weights"], row["context"]) for row in rows] == [
        (weights, context) for weights in ("trained", "random") for context in (16, 32, 64)
    ]
    assert all(row["ms a token"] > 0 and row["prefill s"] > 0 and row["peak bytes"] is None for row in rows)
    assert all(row["tokens/s"] == pytest.approx(2 * 1e3 / row["ms a token"], rel=0.01) for row in rows)
    first, second = ([row["cache bytes"] for row in some] for some in (rows[:3], rows[3:]))
    assert first[1] - first[0] == 2 * 16 * 2 * 2 * 6 * 4  # rows, tokens, keys and values, 2 heads of 6, float32
    assert first[0] < first[1] < first[2] and len(set(second)) == 1
    assert rows[0]["selected"] is None and 0 <= rows[3]["selected"] <= 1
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {
        "latency.svg", "latency_prefill.svg", "latency_memory.svg",
    }  # fmt: skip
    assert capsys.readouterr().out.count("p.yaml") == 3
    assert record["about"]["options of the presets"] == "as they are"


def test_decoding_alone_needs_no_prefill(tmp_path):
    preset = write_preset(tmp_path / "p.yaml", "M S A")
    arguments = ["--preset", preset, "--contexts", "8K", "--random-cache", *QUICK, "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    [row] = json.loads((tmp_path / "out/latency.json").read_text())["rows"]
    assert row["prefill s"] is None and row["ms a token"] > 0


def test_the_peak_of_a_row_is_the_larger_one_of_prefill_and_decoding(tmp_path, monkeypatch):
    found = iter([7, 3, 5, 9])  # prefill and decoding of the first context, then of the second
    monkeypatch.setattr(latency, "peak_bytes", lambda _: next(found))
    out = ["--out", str(tmp_path / "out")]
    assert main(["--preset", write_preset(tmp_path / "p.yaml", "M"), "--contexts", "16,32", *QUICK, *out]) == 0
    rows = json.loads((tmp_path / "out/latency.json").read_text())["rows"]
    assert [row["peak bytes"] for row in rows] == [7, 9]


def test_what_does_not_fit_is_a_row_and_not_the_end(tmp_path, capsys, monkeypatch):
    whole = latency.make_room

    def too_much(cache, tokens):
        if cache.length:  # the second context
            raise torch.OutOfMemoryError("CUDA out of memory")
        whole(cache, tokens)

    monkeypatch.setattr(latency, "make_room", too_much)
    presets = [write_preset(tmp_path / f"{name}.yaml", "A") for name in ("one", "two")]
    assert main(["--preset", *presets, "--contexts", "16,32,64", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("  ")[-1] for line in lines[1:3]] == ["out of memory", "not tried: 32 did not fit"]
    assert len(lines) == 6 and "memory" not in lines[3]


def test_other_faults_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "time_prefill", lambda *_: 1 / torch.ones(2).view(3))
    with pytest.raises(RuntimeError, match="shape"):
        main(["--preset", write_preset(tmp_path / "p.yaml", "M"), "--contexts", "16", *QUICK])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--preset NAME"),
        (["--preset", "taipan_2b"], "taipan_1.3b"),
        (["--preset", "x", "--batch", "0"], "--batch=0"),
    ],
)  # fmt: skip
def test_wrong_input_says_what_to_do(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    preset = write_preset(tmp_path / "p.yaml", "M")
    assert main(["--preset", preset, "--contexts", "16", *QUICK, "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr()
    assert "was not written" in said.err and "p.yaml" not in said.out


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_measured_too(tmp_path):
    preset = write_preset(tmp_path / "p.yaml", "M S W A")
    arguments = ["--preset", preset, "--contexts", "256,1K", *QUICK[:-1], "cuda", "--out", str(tmp_path / "out")]
    earlier = 2**30
    torch.empty(earlier, dtype=torch.uint8, device="cuda")  # another's peak, which is not counted
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "out/latency.json").read_text())["rows"]
    assert [row["context"] for row in rows] == [256, 1024]
    assert all(earlier > row["peak bytes"] > row["cache bytes"] and row["ms a token"] > 0 for row in rows)
