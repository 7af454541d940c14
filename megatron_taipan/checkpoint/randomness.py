"""The state of every random number generator of a process, as tensors of bytes.

Nothing in the project draws from them while it trains: initial weights, the order of samples and the gate's noise are
functions of seeds and counters. They are kept for what users add (dropout, an augmentation of their own).
"""

import json
import random

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Gives every generator of this process a start."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # the GPUs' too


def random_states() -> dict[str, Tensor]:
    """By generator: python, numpy, torch and, where there is a GPU, cuda (the current device); uint8 tensors."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": _as_bytes([version, list(internal), gauss]),
        "numpy": _as_bytes([name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Restores what `random_states` gave; generators that the states do not name stay as they are."""
    if "python" in states:
        version, internal, gauss = _from_bytes(states["python"])
        random.setstate((version, tuple(internal), gauss))
    if "numpy" in states:
        name, keys, position, has_gauss, cached = _from_bytes(states["numpy"])
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _as_bytes(value: list) -> Tensor:
    """JSON, because reading it back executes nothing; floats come back exactly."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> list:
    return json.loads(bytes(tensor.numpy()))
