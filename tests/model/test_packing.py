"""Documents are islands: nothing of one reaches another in any layer type."""

import pytest
import torch

from tests.model.small import close, documents, small_model, tokens

PATTERNS = ["M", "S", "W", "A", "M S M W", "A M S W"]
LENGTHS = (4, 1, 11, 7)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_packed_batch_equals_its_documents_alone(pattern):
    """Logits and the gradients of every parameter."""
    model = small_model(pattern).eval()
    rows = tokens(1, sum(LENGTHS))
    weights = torch.randn(1, sum(LENGTHS), 37, dtype=torch.float64)

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()))

    packed = model(rows, seq_idx=documents(*LENGTHS)).logits
    alone = torch.cat([model(part).logits for part in rows.split(LENGTHS, 1)], 1)
    close(packed, alone)
    for a, b in zip(gradients((packed * weights).sum()), gradients((alone * weights).sum()), strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_changing_one_document_leaves_the_others_bit_equal(pattern, dtype):
    """Several changes, since one might miss the window, the state or the convolution by chance."""
    model = small_model(pattern, torch.float32).to(dtype).eval()
    seq_idx = documents(*LENGTHS)
    rows = tokens(1, sum(LENGTHS))
    with torch.no_grad():
        before = model(rows, seq_idx=seq_idx).logits
        for seed, changed in enumerate((0, 1, 2, 3, 0, 2)):
            here = seq_idx[0] == changed
            other = rows.clone()
            shift = 1 + torch.randint(0, 36, (int(here.sum()),), generator=torch.Generator().manual_seed(seed))
            other[:, here] = (other[:, here] + shift) % 37  # another token everywhere
            after = model(other, seq_idx=seq_idx).logits
            assert torch.equal(after[:, ~here], before[:, ~here]), changed
            assert not torch.equal(after[:, here], before[:, here])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_seq_idx_the_row_is_one_document_that_sees_its_past_only(pattern):
    model = small_model(pattern).eval()
    rows = tokens(2, 14)
    with torch.no_grad():
        whole = model(rows).logits
        close(model(rows, seq_idx=torch.full((2, 14), 3, dtype=torch.int32)).logits, whole)
        changed = rows.clone()
        changed[:, 9] = (changed[:, 9] + 1) % 37
        other = model(changed).logits
    close(other[:, :9], whole[:, :9])
    assert not torch.allclose(other[:, 9:], whole[:, 9:])
    assert not torch.allclose(other[:, 10], whole[:, 10], atol=1e-6) or pattern == "S"
