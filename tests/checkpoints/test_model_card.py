"""The model card says what the model is: its family, and the releases of transformers that load it."""

import pytest

from checkpoints.model_card import describe_run, model_card
from megatron_taipan.versions import TRANSFORMERS_NEWEST, TRANSFORMERS_OLDEST
from tests.checkpoints.made import memory_state


@pytest.mark.parametrize(
    ("pattern", "family", "tags"),
    [
        ("M S W", "Taipan, a Mamba-2 network with selective attention layers (arXiv 2410.18572)",
         "taipan, mamba2, selective-attention, causal-lm"),
        ("S*2", "Taipan, a transformer with selective attention layers (arXiv 2410.18572)",
         "taipan, selective-attention, causal-lm"),
        ("M*3", "Mamba-2 (arXiv 2405.21060)", "taipan, mamba2, causal-lm"),
        ("A*2", "a transformer with full causal attention", "taipan, causal-lm"),
        ("W A", "a transformer with sliding-window attention and full causal attention", "taipan, causal-lm"),
        ("M A", "a hybrid of Mamba-2 (arXiv 2405.21060) and full causal attention layers", "taipan, mamba2, causal-lm"),
    ],
)  # fmt: skip
def test_the_card_names_the_family_that_the_pattern_is(pattern, family, tags):
    card = model_card("name", memory_state(pattern).config.model, "float32", None, None)
    assert f"Architecture:\n{family}.\n" in card
    assert f"\ntags: [{tags}]\n" in card
    assert ("selective" in card) == ("S" in pattern)


def test_the_card_names_the_accepted_releases():
    card = model_card("name", memory_state("M").config.model, "float32", None, None)
    assert f"`transformers` {TRANSFORMERS_OLDEST} or later (tested up to {TRANSFORMERS_NEWEST})." in card


def test_the_card_says_how_the_weights_were_trained():
    config = memory_state("S").config
    optim = config.optim.model_copy(update={"lr": 3e-4, "min_lr": 2e-5, "weight_decay": 0.02, "grad_clip": 0.5})
    data = config.data.model_copy(update={"seq_len": 4096})
    train = config.train.model_copy(update={"precision": "bf16"})
    config = config.model_copy(update={"optim": optim, "data": data, "train": train})
    text = describe_run(config, 1200, 9_830_400, None, 0.15)
    assert text.splitlines() == [
        "- training: 1,200 steps, 9,830,400 tokens; samples of 4,096 tokens; AdamW, peak learning rate",
        "  0.0003, weight decay 0.02, gradient clipping 0.5, bf16",
        "- thresholds of the gates calibrated afterwards to select 15.0% of held-out tokens",
    ]
    assert "training: not recorded" in describe_run(config, None, None, None, None)
    config = config.model_copy(update={"optim": optim.model_copy(update={"name": "muon"})})
    assert "4,096 tokens; Muon (matrices) and AdamW, peak" in describe_run(config, 1200, 9_830_400, None, None)
