"""Begins to read a tokenizer.json with fastokens before anything else is imported: it is the longest step of the start.

This module imports nothing that takes time, and neither does fastokens, which reads without Python's lock held.
"""

import os
from threading import Thread

ONE_THREAD = {"FASTOKENS_BPE_THREADS": "1", "RAYON_NUM_THREADS": "1"}  # the workers are the parallelism


class PrefetchedTokenizer:
    """Reads a tokenizer.json with fastokens in a separate thread, while the reference library reads it too."""

    def __init__(self, path: str):
        self.path = path
        self.model: object = None
        self.thread = Thread(target=self._load)
        os.environ.update(ONE_THREAD)
        self.thread.start()

    def _load(self) -> None:
        try:
            import fastokens

            self.model = fastokens.Tokenizer.from_file(self.path)
        except Exception:  # `fast_backend_of` tries again and says what is wrong
            self.model = None

    def result(self):
        """The model, or None; the thread has ended then, as it must before a fork."""
        self.thread.join()
        return self.model


def guess(arguments: list[str]) -> PrefetchedTokenizer | None:
    """Starts reading what a plain `tokenize ... --tokenizer FILE.json ...` will need; any other form can wait."""
    if arguments[:1] != ["tokenize"] or "--tokenizer" not in arguments[:-1]:
        return None
    if "--backend" in arguments or "--allow-special" in arguments:
        return None
    path = arguments[arguments.index("--tokenizer") + 1]
    return PrefetchedTokenizer(path) if path.endswith(".json") and os.path.isfile(path) else None
