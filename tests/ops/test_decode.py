"""Attention of one decoded token against torch's, over the slots that its row sees."""

import torch
import torch.nn.functional as F

from megatron_taipan.ops.decode import decode_attention_reference


def test_each_row_attends_to_its_own_slots_and_a_row_without_any_gets_zeros():
    rows, heads, key_heads, size, slots = 4, 4, 2, 8, 6
    q = torch.randn(rows, heads, size, dtype=torch.float64)
    keys, values = torch.randn(2, rows, slots, key_heads, size, dtype=torch.float64).unbind()
    lo, hi = torch.tensor([0, 2, 5, 3]), torch.tensor([5, 4, 5, 2])
    out = decode_attention_reference(q, keys, values, lo, hi, slots)
    for row in range(rows):
        seen = slice(int(lo[row]), int(hi[row]) + 1)
        if seen.start >= seen.stop:
            assert not out[row].any()
            continue
        k, v = (t[row, seen].transpose(0, 1)[None] for t in (keys, values))  # [1, hk, s, d]
        expected = F.scaled_dot_product_attention(q[row, None, :, None], k, v, enable_gqa=True)[0, :, 0]
        torch.testing.assert_close(out[row], expected, rtol=0, atol=1e-12)
