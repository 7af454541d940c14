"""`python -m benchmarks lengths` on a CPU: a small network in place of the presets, or stand-ins for its step."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import lengths, step
from benchmarks.__main__ import main, make_parser
from tests.distributed.launch import launch

TINY = ["model.pattern=M S", "model.vocab_size=64", "model.d_model=32", "model.d_ff=48", "optim.kernel=torch"]
TINY += ["model.mamba={d_state: 16, headdim: 16, chunk_size: 16}", "model.attention={n_heads: 2, window: 12}"]
SMALL = ["--lengths", "16", "32", "--tokens", "64", "--micro-tokens", "16", "--expect", "1"]
GRAPHS = "train.cuda_graphs=true"
LIMITS = {"none": 16, "selective": 32, "full": 64}  # tokens of a micro-batch that fit


@pytest.fixture
def gpu(monkeypatch):
    """The calls of a GPU, answered on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "toy GPU")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(lengths.gc, "collect", lambda: 0)  # slow


@pytest.fixture
def tried(gpu, monkeypatch):
    """What is measured in place of steps: (name, length, recompute), in order. Fits by LIMITS."""
    found = []

    def measured(config, profiled, repeats, warm):
        tokens, p = config.train.micro_batch * config.data.seq_len, config.parallel.recompute
        found.append((config.name, config.data.seq_len, p))
        if tokens > LIMITS[p]:
            raise RuntimeError("the recording ended") from torch.OutOfMemoryError("CUDA out of memory.")
        return {"ms": 2.0, "tokens/s": config.train.global_batch * config.data.seq_len * 500, "GiB": tokens / 8}

    monkeypatch.setattr(lengths, "our_step", measured)
    return found


def results(out: Path) -> dict:
    lines = [json.loads(line) for line in (out / "lengths.jsonl").read_text().splitlines()]
    return {(line["run"]["model"], line["run"]["length"]): line.get("result", line.get("error")) for line in lines}


def test_every_length_has_the_same_tokens_and_the_least_recomputation_that_fits(tried, tmp_path, capsys):
    sizes = ["--lengths", "4", "16", "32", "64", "128", "--tokens", "128", "--micro-tokens", "16", "--expect", "1"]
    command = ["lengths", "--presets", "taipan_190m", "mamba2_190m", *sizes, "--out", str(tmp_path)]
    assert main(command) == 0
    rows = results(tmp_path)
    assert len(rows) == 10
    taipan = {length: row for (model, length), row in rows.items() if model == "taipan_190m"}
    assert [(row["rows"], row["micro_batches"]) for row in taipan.values()] == [(4, 8), (1, 8), (1, 4), (1, 2), (1, 1)]
    assert [row.get("recompute") for row in taipan.values()] == ["none", "none", "selective", "full", None]
    assert {row["tokens/s"] for row in taipan.values() if "tokens/s" in row} == {128 * 500}
    assert taipan[128]["failed"] == "out of memory" and taipan[64]["out_of_memory"] == ["none", "selective"]
    kinds = [(length, kind) for name, length, kind in tried if name == "taipan_190m"]
    assert kinds[2:] == [(32, "none"), (32, "selective"), (64, "selective"), (64, "full"), (128, "full")]

    before, made = (tmp_path / "lengths.jsonl").read_bytes(), len(tried)
    assert main(command) == 0  # nothing is missing
    assert (tmp_path / "lengths.jsonl").read_bytes() == before and len(tried) == made
    (tmp_path / "lengths.jsonl").write_bytes(before[:-20])  # as a killed process leaves it
    assert main(command) == 0
    assert len(tried) == made + 1 and tried[-1] == ("mamba2_190m", 128, "full")
    assert "10 of 10" in capsys.readouterr().out
    assert main([*command, "--recompute", "full"]) == 0  # other settings are other measurements
    assert tried[made + 1 :] == [(m, n, "full") for m in ("taipan_190m", "mamba2_190m") for n in (4, 16, 32, 64, 128)]


def test_whole_rows_of_full_attention_have_no_masks_unless_asked_for(gpu, monkeypatch, tmp_path):
    masks = {}

    def measured(config, **_):
        masks[config.name] = config.data.mask_documents
        return {"ms": 1.0, "tokens/s": 5, "GiB": 1.0}

    monkeypatch.setattr(lengths, "our_step", measured)
    names = ["taipan_190m", "samba_190m", "jamba_190m", "transformerpp_190m"]
    command = ["lengths", "--presets", *names, *SMALL, "--out", str(tmp_path)]
    assert main(command) == 0
    assert masks == {"taipan_190m": True, "samba_190m": True, "jamba_190m": False, "transformerpp_190m": False}
    assert main([*command, "--overrides", "data.mask_documents=true"]) == 0
    assert all(masks.values()) and len(masks) == 4


def test_what_fails_for_another_reason_is_tried_again(gpu, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("illegal address")

    command = ["lengths", "--presets", "taipan_190m", *SMALL, "--out", str(tmp_path)]
    monkeypatch.setattr(lengths, "our_step", broken)
    assert main(command) == 0
    assert set(results(tmp_path).values()) == {"RuntimeError: illegal address"}
    monkeypatch.setattr(lengths, "our_step", lambda *args, **kwargs: {"ms": 1.0, "tokens/s": 5, "GiB": 1.0})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 << 30)
    assert main(command) == 0  # what an earlier measurement still holds would count
    assert all("3.0 GiB are still in use" in error for error in results(tmp_path).values())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    assert main(command) == 0
    assert all(row["tokens/s"] == 5 for row in results(tmp_path).values())


def test_no_measurement_starts_too_late_and_the_same_command_goes_on(tried, tmp_path, capsys):
    command = ["lengths", "--presets", "taipan_190m", *SMALL, "--out", str(tmp_path)]
    assert main([*command, "--until", "50", "--expect", "60"]) == 0
    assert not tried and "0 of 2" in capsys.readouterr().out
    assert main([*command, "--until", "50"]) == 0
    assert len(results(tmp_path)) == 2


def test_steps_of_different_sizes_are_refused_before_anything_is_measured(tried, tmp_path, capsys):
    command = ["lengths", "--presets", "taipan_190m", "--out", str(tmp_path), "--lengths", "16", "48"]
    assert main([*command, "--tokens", "64", "--micro-tokens", "16"]) == 2
    assert "1 x 48 (remainder 16)" in (said := capsys.readouterr().err) and "--tokens 96" in said
    assert not tried and not (tmp_path / "lengths.jsonl").exists()


def test_tables_and_pictures_need_no_gpu(tried, monkeypatch, tmp_path, capsys):
    command = ["lengths", "--presets", "taipan_190m", "mamba2_190m", "--out", str(tmp_path)]
    command += ["--lengths", "16", "64", "128", "--tokens", "128", "--micro-tokens", "16"]
    assert main(command) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capsys.readouterr()
    assert main([*command, "--table"]) == 0
    table = capsys.readouterr().out
    assert (
        "| tokens/s | 16 | 64 | 128 |" in table and "| mamba2_190m | 64,000 | 64,000 (full) | out of memory |" in table
    )
    assert "| taipan_190m | 64 | 2 x 1 | full | – | 2 | 64,000 | 8 |" in table and "toy GPU" in table
    picture = (tmp_path / "lengths.svg").read_text()
    assert "taipan_190m" in picture and ">full<" in picture and "128 tokens a step, toy GPU" in picture
    assert "GiB held" in (tmp_path / "lengths-memory.svg").read_text()
    assert main([*command, "--table", "--recompute", "none"]) == 2
    assert "holds no result" in capsys.readouterr().err


def test_a_line_belongs_to_the_configuration_that_it_was_measured_with(tried, monkeypatch, tmp_path, capsys):
    """Not to the command alone: a default may have changed, and earlier versions did not say what they measured."""
    command = ["lengths", "--presets", "taipan_190m", *SMALL, "--out", str(tmp_path)]
    table = [*command, "--table"]

    def printed(arguments: list[str]) -> str:
        assert main(arguments) == 0
        return capsys.readouterr().out

    assert "2 of 2" in printed(command) and "*" not in printed(table)
    file = tmp_path / "lengths.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        del record["run"]["config"], record["result"]["commit"]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "| 2 | 32,000 |" in (said := printed(table)) and said.count("none*") == 2 and "selective*" in said
    assert "*: made with another configuration" in said and "commits not recorded" in said
    made = len(tried)
    assert "2 of these were made with another configuration" in printed(command) and len(tried) == made + 3
    assert "*" not in (said := printed(table)) and said.count("| taipan_190m |") == 3  # one, and two by length
    assert "again" not in printed(command) and len(tried) == made + 3

    other = lengths.preset
    with_graphs = lambda options: other(Namespace(**vars(options) | {"overrides": [GRAPHS, *options.overrides]}))  # noqa: E731
    monkeypatch.setattr(lengths, "preset", with_graphs)  # as if it were the default
    assert printed(table).count("*") > 3
    assert "2 of these" in printed(command) and len(tried) == made + 6 and len(file.read_text().splitlines()) == 6
    assert "*" not in printed(table)


def test_whether_layers_ran_as_graphs_is_in_the_table(gpu, monkeypatch, tmp_path, capsys):
    said = iter(["layers run as 24 CUDA graphs", "layers run one by one (train.cuda_graphs=auto: with 131,072 tokens)"])
    monkeypatch.setattr(
        lengths, "our_step", lambda *_, **__: {"ms": 1.0, "tokens/s": 5, "GiB": 1.0, "layers": next(said)}
    )
    command = ["lengths", "--presets", "taipan_190m", *SMALL, "--out", str(tmp_path)]
    assert main(command) == 0 and main([*command, "--table"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| taipan_190m | ")]
    assert ["graphs" in row for row in rows[1:]] == [True, False] and "one by one" in rows[2]


def real_steps(out: str) -> list[list]:
    """Our step and the peer's on a CPU, without a clock; tokens/s, DeepSpeed's steps and micro-batches of each."""
    torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = torch.cuda.empty_cache = lambda: None
    torch.cuda.max_memory_reserved = torch.cuda.memory_allocated = lambda: 0
    torch.cuda.memory_stats = dict
    step.median_step_ms = lambda run, repeats, warm: run() or 1.0
    torch.nn.Module.compile = lambda self: None
    step.peers.make_transformer = partial(step.peers.make_transformer, layers=1)
    counts, end = [], step.Training.end

    def counted(self):
        counts.append((self.engine.global_steps, self.engine.micro_steps))
        end(self)

    step.Training.end = counted
    command = [
        "lengths",
        "--presets",
        "taipan_190m",
        "--peer",
        *SMALL,
        "--ops",
        "reference",
        "--out",
        out,
        "--lengths",
        "16",
    ]
    lengths.run(make_parser("lengths").parse_args([*command, "--overrides", *TINY]))
    return [
        [*key, row["tokens/s"], *count] for (key, row), count in zip(results(Path(out)).items(), counts, strict=True)
    ]


def test_a_step_is_all_its_micro_batches_and_one_update_of_ours_and_of_the_peer(tmp_path):
    two_steps = [16, 64_000, 2, 8]
    assert launch(1, real_steps, str(tmp_path))[0] == [["taipan_190m", *two_steps], [lengths.PEER, *two_steps]]
