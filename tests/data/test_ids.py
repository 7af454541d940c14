"""Where in a large file the first id is that the model does not have."""

import numpy as np
import pytest

from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError


def test_an_id_beyond_the_first_million_tokens_is_named_with_its_position(tmp_path):
    """A file is looked at a million ids at a time."""
    million = np.zeros(1 << 20, np.uint16)
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(million)
        writer.add_document([1, 2, 77, 3])
    with pytest.raises(UserError, match=rf"holds id 77 at token {len(million) + 2} \(in document 1\).* has 50 ids"):
        build_dataset(DataConfig(train=str(tmp_path / "x"), seq_len=8, valid_fraction=0), "train", 50)
