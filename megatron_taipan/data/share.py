"""Files dealt out over processes, each of which reads its own."""


def share(files: list[tuple[int, str]], parts: int, number: int) -> list[str]:
    """The names of part `number` when files (bytes, name) are dealt out so that every part has about the same size."""
    loads, mine = [0] * parts, []
    for size, name in sorted(files, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += size
        if lightest == number:
            mine.append(name)
    return mine
