"""The sizes that the kernels with matrix products support."""


def fit_tiles(*sizes: int) -> bool:
    """Whether heads and states of these sizes can be sides of a tile: powers of two from 16 to 128."""
    return all(16 <= size <= 128 and size & (size - 1) == 0 for size in sizes)
