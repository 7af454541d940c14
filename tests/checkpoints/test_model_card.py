"""The model card says what the model is: its family, and the releases of transformers that load it."""

import pytest

from checkpoints.model_card import model_card
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
