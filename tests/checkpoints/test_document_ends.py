"""Of data without a manifest the documents themselves say what stood around them: all of those looked at, or none."""

import numpy as np
import pytest

from checkpoints.document_ends import LOOKED_AT, DocumentEnds, document_ends
from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.data_config import DataConfig

BOS, EOS = 1, 2


def ends(path, *pairs):
    """What is found for sources of these documents."""
    prefixes = []
    for number, documents in enumerate(pairs):
        prefixes.append(str(path / str(number)))
        with IndexedWriter(prefixes[-1], np.uint16) as writer:
            for document in documents:
                writer.add_document(document)
    return document_ends(DataConfig(train=prefixes), BOS, EOS)


@pytest.mark.parametrize(
    ("documents", "found"),
    [
        ([[BOS, 5, EOS], [BOS, 6, EOS]], (BOS, EOS)),
        ([[5, EOS], [6, 7, EOS]], (None, EOS)),
        ([[BOS, 5, EOS], [6, EOS]], (None, EOS)),
        ([[BOS, 5, EOS], [BOS, 6]], (BOS, None)),
        ([[5], [6]], (None, None)),
        ([[BOS, 5, EOS], [], [BOS, 6, EOS]], (BOS, EOS)),  # an empty one says nothing
    ],
)
def test_what_all_documents_have(tmp_path, documents, found):
    assert ends(tmp_path, documents) == DocumentEnds(*found)


def test_what_sources_disagree_on_counts_as_none(tmp_path):
    assert ends(tmp_path, [[BOS, 5, EOS]], [[6, EOS]]) == DocumentEnds(None, EOS)
    assert ends(tmp_path, [[BOS, 5, EOS]], [[]]) is None  # nothing is known of the second


def test_documents_of_the_whole_file_are_looked_at(tmp_path):
    documents = [[5, EOS]] * (10 * LOOKED_AT) + [[5]] * (10 * LOOKED_AT)
    assert ends(tmp_path, documents) == DocumentEnds(None, None)
