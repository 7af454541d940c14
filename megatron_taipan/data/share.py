"""Distributes files over processes, each of which reads its own."""


def share(files: list[tuple[int, str]], parts: int, number: int) -> list[str]:
    """The names in part `number` of files (bytes, name) that are split into parts of about the same size."""
    loads, mine = [0] * parts, []
    for size, name in sorted(files, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += size
        if lightest == number:
            mine.append(name)
    return mine
