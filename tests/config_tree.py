"""A small configuration, for tests of how one is read, checked and written."""

import copy

TREE = {
    "model": {"pattern": "M S", "vocab_size": 100, "d_model": 48, "d_ff": 64},
    "data": {"train": "some/where"},
    "train": {"steps": 10, "global_batch": 8},
    "checkpoint": {"dir": "runs/x"},
}


def tree(**changes) -> dict:
    """TREE with dotted changes, a dot written as two underscores."""
    out = copy.deepcopy(TREE)
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return out
