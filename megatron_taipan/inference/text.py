"""The tokenizer of a trained model, and samples of its training text."""

from pathlib import Path

from megatron_taipan.data.made_with import added_ids
from megatron_taipan.data.sources import has_index, open_reader
from megatron_taipan.data_config import DataConfig
from megatron_taipan.tokenizer.base import Tokenizer
from megatron_taipan.tokenizer.load import load_tokenizer_file


def model_tokenizer(path: Path, data: DataConfig | None = None) -> Tokenizer:
    """The tokenizer in a file.

    Args:
        data: what the model was trained on; the token that its manifests say ends a document is the one that ends a
            text.

    Raises:
        UserError: the file is missing or of another kind.
    """
    tokenizer = load_tokenizer_file(path)
    added = added_ids(source.prefix for source in data.train) if data else {}
    if "eod" in added:
        tokenizer.end_ids = (added["eod"],)
    return tokenizer


def sample_texts(data: DataConfig, tokenizer: Path, count: int = 200, longest: int = 4000) -> list[str]:
    """Text of up to `count` training documents, decoded, spread evenly over the datasets; none where the data is gone.

    Args:
        longest: tokens taken of each document.
    """
    loaded, texts = model_tokenizer(tokenizer, data), []
    for source in data.train:
        if not has_index(source.prefix):
            continue
        reader = open_reader(source.prefix)
        step = max(1, reader.n_documents * len(data.train) // count)
        for index in range(0, reader.n_documents, step):
            ids = reader.document(index)[:longest].tolist()
            kept = [i for i in ids if i not in loaded.end_ids]
            texts.append(loaded.decode(kept, skip_special_tokens=True))
    return texts
