"""Attention of one decoded token against torch's, over the tokens that its row sees."""

import pytest
import torch
import torch.nn.functional as F

from megatron_taipan.ops.decode import decode_attention_reference


@pytest.mark.parametrize("window", [None, 3, 1])
@pytest.mark.parametrize("some", [True, False])
def test_each_row_attends_within_its_document_and_window_and_a_row_that_is_not_chosen_gets_zeros(window, some):
    rows, heads, key_heads, size, slots, first, position = 4, 4, 2, 8, 7, 20, 25
    q = torch.randn(rows, heads, size, dtype=torch.float64)
    k, v = torch.randn(2, rows, key_heads, size, dtype=torch.float64)
    keys, values = torch.randn(2, rows, slots, key_heads, size, dtype=torch.float64).unbind()
    held = [keys.clone(), values.clone()]
    start, chosen = torch.tensor([20, 22, 25, 24]), torch.tensor([True, True, True, False]) if some else None
    places = torch.tensor(first), torch.tensor([position])
    out = decode_attention_reference(q, k, v, keys, values, *places, start, window, chosen)
    for old, new, buffer in zip(held, (k, v), (keys, values), strict=True):
        old[:, position - first] = new
        assert torch.equal(buffer, old)
    for row in range(rows):
        if some and row == 3:
            assert not out[row].any()
            continue
        seen = [at - first for at in range(int(start[row]), position + 1) if window is None or at > position - window]
        k, v = (t[row, seen].transpose(0, 1)[None] for t in (keys, values))  # [1, hk, s, d]
        expected = F.scaled_dot_product_attention(q[row, None, :, None], k, v, enable_gqa=True)[0, :, 0]
        torch.testing.assert_close(out[row], expected, rtol=0, atol=1e-12)
