"""Coverage-guided fuzzing, for as long as you like (needs `pip install atheris`; not part of the tests).

    python -m tests.fuzz.run index -max_total_time=600 CORPUS_FOLDER
    python -m tests.fuzz.run lines -max_total_time=600 CORPUS_FOLDER       and so on: tests/fuzz/targets.py

What it finds is written as crash-... and raises with a traceback. The options are libFuzzer's.
"""

import sys
import tempfile
from pathlib import Path

import atheris

READERS = [
    "megatron_taipan.data.indexed",
    "data_prep.long_text",
    "data_prep.kinds.json_files",
    "data_prep.kinds.text_files",
    "data_prep.kinds.records",
    "data_prep.readers",
    "data_prep.packed",
]
with atheris.instrument_imports(include=READERS):
    from tests.fuzz import targets

from tests.fuzz.seeds import seeds  # noqa: E402


def main() -> None:
    name = sys.argv.pop(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    for corpus in sys.argv[1:]:
        if not corpus.startswith("-"):
            Path(corpus).mkdir(parents=True, exist_ok=True)
            for number, seed in enumerate(seeds(name)):
                (Path(corpus) / f"seed{number}").write_bytes(seed)
    atheris.Setup(sys.argv, lambda data: getattr(targets, name)(folder, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
