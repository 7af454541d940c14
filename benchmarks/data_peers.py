"""What data preparation is measured against, each run in a separate process.

    python -m benchmarks.data_peers NAME CORPUS TOKENIZER WORKERS OUTPUT

    megatron    as Megatron-LM's tools/preprocess_data.py does it: worker processes send the ids of each document to the
                parent, which adds them one by one
    gigatoken   as its tools/preprocess_data_fast.py does it: the library gigatoken reads and tokenizes the whole file
                in threads, and the ids of the corpus are written from memory
    library     only the tokenizer library that data_prep chose: documents already in memory, encoded in worker
                processes and discarded. Not a tool, but an upper limit for one.

megatron-core contains neither tool, so both are written here, with its IndexedDatasetBuilder and without what the tools
import besides (megatron.training), so they start faster than the real tools.
"""

import json
import multiprocessing
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


NEEDS = {"megatron": ("megatron",), "gigatoken": ("megatron", "gigatoken", "awkward"), "library": ()}


def importable(name: str) -> bool:
    """Whether the packages of a contender are installed."""
    return all(find_spec(package) for package in NEEDS[name])


class _Encoder:
    """What Megatron's tool runs in its workers: one JSON line in, the ids of the document out."""

    def __init__(self, tokenizer: str):
        self.name = tokenizer

    def start(self) -> None:
        from megatron_taipan.tokenizer.load import load_tokenizer

        _Encoder.tokenizer = load_tokenizer(self.name)  # type: ignore[attr-defined]

    def encode(self, line: str) -> tuple[list[int], int]:
        tokenizer = _Encoder.tokenizer  # type: ignore[attr-defined]
        ids = tokenizer.encode(json.loads(line)["text"])
        return [*ids, tokenizer.eod], len(line)


def megatron(corpus: str, tokenizer: str, workers: int, output: str) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_taipan.tokenizer.load import load_tokenizer

    encoder = _Encoder(tokenizer)
    dtype = DType.optimal_dtype(load_tokenizer(tokenizer).vocab_size)
    builder = IndexedDatasetBuilder(output + ".bin", dtype=dtype)
    with open(corpus, encoding="utf-8") as file, multiprocessing.Pool(workers, initializer=encoder.start) as pool:
        for ids, _ in pool.imap(encoder.encode, file, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(output + ".idx")


def library_alone(corpus: str, tokenizer: str, workers: int, output: str) -> None:
    from data_prep.fast import fast_backend_of
    from megatron_taipan.tokenizer.files import tokenizer_file
    from megatron_taipan.tokenizer.load import load_tokenizer

    del output
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encoder = load_tokenizer(tokenizer)
    if not tokenizer.startswith("tiktoken:"):
        try:
            encoder = fast_backend_of(encoder, tokenizer_file(tokenizer))
        except ValueError:
            pass
    context = multiprocessing.get_context("fork")
    started = time.perf_counter()
    share = -(-len(texts) // workers)
    processes = [
        context.Process(target=_encode_all, args=(encoder, texts[share * i : share * (i + 1)])) for i in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(f"encoding alone: {time.perf_counter() - started:.2f} s")


def _encode_all(encoder, texts: list[str]) -> None:
    for at in range(0, len(texts), 64):
        encoder.encode_batch(texts[at : at + 64])


def gigatoken_fast(corpus: str, tokenizer: str, workers: int, output: str) -> None:
    """As preprocess_data_fast.py does it; it uses all cores and ignores `workers`."""
    import awkward
    import gigatoken
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_taipan.tokenizer.load import load_tokenizer

    del workers
    reference = load_tokenizer(tokenizer)
    load = gigatoken.Tokenizer if tokenizer.endswith(".json") else gigatoken.Tokenizer.from_sentencepiece
    documents = load(tokenizer).encode_files(gigatoken.JsonlFileSource([corpus], field="text"))
    end = awkward.from_regular(np.full((len(documents), 1), reference.eod, np.uint32))
    documents = awkward.concatenate([documents, end], axis=1)
    dtype = DType.optimal_dtype(reference.vocab_size)
    builder = IndexedDatasetBuilder(output + ".bin", dtype=dtype)
    builder.data_file.write(awkward.to_numpy(awkward.flatten(documents)).astype(dtype).tobytes())
    builder.sequence_lengths.extend(awkward.to_numpy(awkward.num(documents)).tolist())
    builder.document_indices.extend(range(1, len(documents) + 1))
    builder.finalize(output + ".idx")


def main(arguments: list[str]) -> None:
    name, corpus, tokenizer, workers, output = arguments
    run = {"megatron": megatron, "gigatoken": gigatoken_fast, "library": library_alone}[name]
    run(corpus, tokenizer, int(workers), output)


if __name__ == "__main__":
    main(sys.argv[1:])
