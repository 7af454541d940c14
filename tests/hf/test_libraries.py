"""PEFT, TRL and accelerate on an exported folder, their pinned releases, in a process that cannot import our package.

They are installed without their dependencies, which the usual environment has, into a folder of the test's own. All
together take about a minute, most of it for TRL's imports and for the export.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from checkpoints.export_hf import export
from megatron_taipan.inference.loading import build_with_weights, load_model
from megatron_taipan.model.taipan import Taipan
from tests.checkpoints.made import ROOT, memory_state, train_sentencepiece
from tests.hf import tuner
from tests.hf.test_versions import naive_greedy

LIBRARIES = ("peft", "trl", "accelerate")
PROMPT = torch.arange(3, 43).view(2, 20)


def pinned(library: str) -> str:
    """`library==version`, as constraints.txt has it."""
    name = re.sub("[-_]", "[-_]", library)
    return re.search(rf"^{name}==\S+", (ROOT / "constraints.txt").read_text(), re.M | re.I).group()


def install(site: Path, libraries: Sequence[str]) -> Path:
    """The pinned releases of these libraries, without their dependencies, in a folder; skips where pip gets none."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["--retries", "1", "--no-deps", "--target", str(site), *map(pinned, libraries)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        pytest.skip(f"pip gets none of {libraries}: {done.stderr.strip().splitlines()[-1:]}")
    return site


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """What `tuner.py` answered; `state`: what it was made from, `work`: the folder that it wrote into."""
    place = tmp_path_factory.mktemp("tuned")
    site, folder, work = install(place / "site", LIBRARIES), place / "hf", place / "work"
    state = memory_state("M S W M A", vocab_size=600)
    export(state, folder, tokenizer=train_sentencepiece(place))
    work.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", tuner.__file__, str(folder), str(site), str(work)]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert not done.returncode, done.stderr[-3000:]
    return torch.load(work / "answers.pt", weights_only=False) | {"state": state, "work": work}


def trainers(state, added: dict[str, torch.Tensor] | None = None) -> Taipan:
    """The trainer's network in float64, with what adapters add to its weights."""
    model = build_with_weights(state.config.model, state.load, torch.float32).double()
    for name, parameter in model.named_parameters():
        if added and name in added:
            parameter += added[name]
    return model


@pytest.mark.slow
@torch.no_grad()
def test_lora_is_the_trainers_network_with_the_sums_as_weights(answers):
    lora, state = answers["lora"], answers["state"]
    model = trainers(state, lora["added"])
    wanted = model(PROMPT).logits
    assert (wanted - trainers(state)(PROMPT).logits).abs().max() > 0.1
    matrices = {name for name in state.names() if "_proj" in name}
    assert lora["added"].keys() == matrices and not lora["without gradient"]
    for how in ("logits", "read again", "merged"):
        torch.testing.assert_close(lora[how], wanted, rtol=0, atol=1e-8, msg=how)
    assert torch.equal(lora["text"], naive_greedy(model, PROMPT, 12))
    torch.testing.assert_close(lora["merged, read again"], wanted, rtol=0, atol=1e-4)
    ours, _, _ = load_model(answers["work"] / "merged")
    torch.testing.assert_close(ours.double()(PROMPT).logits, wanted, rtol=0, atol=1e-4)
    kinds = {re.search(r"\.(\w+)\.(?:lora_|modules_to_save)", name).group(1) for name in lora["by name"]}
    assert kinds == {"q_proj", "in_proj_x", "gate"}


@pytest.mark.slow
@torch.no_grad()
def test_a_soft_prompt_stands_before_the_text(answers):
    """The text behind it is that of the trainer's network, to which the vectors are given as an embedding's rows."""
    soft, model = answers["soft prompt"], trainers(answers["state"])
    assert soft["gradient"] > 0
    before = torch.arange(600, 600 + len(soft["vectors"])).expand(2, -1)
    model.embedding.weight = torch.nn.Parameter(torch.cat([model.embedding.weight, soft["vectors"]]))
    text = torch.cat([before, PROMPT], 1)
    for _ in range(8):  # the new rows are no tokens that could be written
        text = torch.cat([text, model(text).logits[:, -1:, :600].argmax(-1)], 1)
    assert torch.equal(soft["text"], text[:, 3:])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("how", ["disk", "mixed"])
def test_offloaded_weights_give_the_same_logits(answers, how):
    model, answer = trainers(answers["state"]), answers["offloaded"][how]
    assert answer["offloaded"] > 10
    torch.testing.assert_close(answer["logits"].double(), model(PROMPT).logits, rtol=0, atol=1e-4)
    assert torch.equal(answer["text"], naive_greedy(model, PROMPT, 6))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sft", "sft packed", "sft lora", "dpo"])
def test_ten_steps_lower_the_loss(answers, how):
    losses = [line["loss"] for line in answers["tuned"][how]]
    assert len(losses) == 10 and sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses


@pytest.mark.slow
def test_other_losses_teach_too(answers):
    accuracy = [line["mean_token_accuracy"] for line in answers["tuned"]["sft dft"]]
    assert sum(accuracy[-3:]) > sum(accuracy[:3]) + 0.1, accuracy
    sampled = answers["tuned"]["grpo lora"]
    assert len(sampled) == 2 and all(line["completions/mean_length"] > 0 for line in sampled)
