"""The state of every random number generator of a process, as tensors of bytes.

Nothing in the project draws from them while it trains: initial weights, the order of samples and the gate's noise are
functions of seeds and counters. They are kept for what users add (dropout, data augmentation).
"""

import json
import random

import numpy as np
import torch
from torch import Tensor

from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import parse_json


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
    """Restores what `random_states` gave; generators that the states do not name stay as they are.

    Raises:
        UserError: one is not a state of its generator.
    """
    setters = {"python": _set_python, "numpy": _set_numpy, "torch": torch.set_rng_state}
    if torch.cuda.is_available():
        setters["cuda"] = torch.cuda.set_rng_state
    for name, set_state in setters.items():
        if name in states:
            try:
                set_state(states[name])
            except (ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
                raise UserError(
                    f"the checkpoint's state of the random numbers of {name} is damaged:"
                    f" {' '.join(str(error).split())[:200]}; go on from another checkpoint"
                ) from error


def _set_python(state: Tensor) -> None:
    version, internal, gauss = _from_bytes(state)
    random.setstate((version, tuple(internal), gauss))


def _set_numpy(state: Tensor) -> None:
    name, keys, position, has_gauss, cached = _from_bytes(state)
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _as_bytes(value: list) -> Tensor:
    """JSON, because reading it back executes nothing; floats come back exactly."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> list:
    return parse_json(bytes(tensor.numpy()))
