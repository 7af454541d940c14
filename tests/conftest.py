"""What holds for every test: one thread, fixed seeds, GPU tests only where there is a GPU."""

import os
import random
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests start several processes on few cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would need the network fails at once

import hypothesis
import numpy
import pytest
import torch

torch.set_num_threads(1)

# A shell starts what runs in its background with SIGINT ignored, and programs inherit that: tests that stop theirs with
# Ctrl-C would wait for ever. Caught here, it is at its default again in whatever a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the first example of a test pays for imports. Derandomized in CI, so that a red run can be repeated.
hypothesis.settings.register_profile("taipan", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("taipan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where torch finds no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """A test that draws without a seed of its own draws the same numbers in any order of tests."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
