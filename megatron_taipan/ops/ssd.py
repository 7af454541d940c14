"""State-space duality: the chunked scan of Mamba-2 and its single step (arXiv 2405.21060, section 6).

The recurrence, per head, with state s [p, n]:

    s_t = exp(dt_t A) s_{t-1} + dt_t x_t B_t^T          y_t = s_t C_t + D x_t

Documents packed into one row are independent: the state starts at zero where seq_idx changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.ops.numerics import at_least_float32


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Chunked scan in plain torch; any device; float32 accumulation, float64 where x is float64.

    Args:
        x: [b, l, h, p] inputs of h heads of p channels.
        dt: [b, l, h] step sizes, positive (after softplus).
        A: [h] decay rates, negative.
        B, C: [b, l, g, n]; g divides h, consecutive heads share a group.
        chunk_size: tokens per chunk; changes speed, not results.
        D: [h] skip connection.
        seq_idx: [b, l] document of each token, non-decreasing; None: one document.
        initial_state: [b, h, p, n], the state before the first token, from the first token's document.
        return_state: also return the state after the last token, [b, h, p, n], of the last token's document.

    Returns:
        y [b, l, h, p] in x's dtype, or (y, state) with the state in the accumulation dtype.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    if h % g:
        raise ValueError(f"ssd: {g} groups do not divide {h} heads")
    out_dtype = x.dtype
    x_in = x
    x, dt, A, B, C = (at_least_float32(t) for t in (x, dt, A, B, C))
    q = min(chunk_size, l)
    seq = torch.zeros(b, l, dtype=torch.int32, device=x.device) if seq_idx is None else seq_idx

    # A padded tail of dt = 0 neither decays nor feeds the state.
    pad = -l % q
    if pad:
        x, dt, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) for t in (x, dt, B, C))
        seq = torch.cat([seq, seq[:, -1:].expand(b, pad)], 1)
    c = (l + pad) // q
    x = (x * dt[..., None]).view(b, c, q, g, h // g, p)  # dt_t x_t; heads as [group, head in group]
    B, C = B.view(b, c, q, g, n), C.view(b, c, q, g, n)
    seq = seq.view(b, c, q)
    log_decay = (dt * A).view(b, c, q, g, h // g)
    # [b, c, q, g, k]: log decay through token i, from the start of its chunk or of its document if that is later
    cum = log_decay.cumsum(2) if seq_idx is None else _cumsum_by_document(log_decay, seq)

    # 1. Inside a chunk: token i sees token j <= i of its own document, decayed over the tokens between them.
    between = cum[:, :, :, None] - cum[:, :, None]  # [b, c, i, j, g, k]
    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    visible = causal & (seq[:, :, :, None] == seq[:, :, None])  # [b, c, i, j]
    weight = between.masked_fill(~visible[..., None, None], float("-inf")).exp()
    scores = torch.einsum("bcign,bcjgn->bcijg", C, B)
    y = torch.einsum("bcijgk,bcjgkp->bcigkp", scores[..., None] * weight, x)

    # 2. What each chunk adds to the state of its last token's document.
    last = seq[:, :, -1:]  # [b, c, 1]
    to_end = (cum[:, :, -1:] - cum).masked_fill((seq != last)[..., None, None], float("-inf")).exp()
    added = torch.einsum("bcjgn,bcjgk,bcjgkp->bcgkpn", B, to_end, x)

    # 3. The state passed from chunk to chunk; a chunk that ends in another document forgets what came in.
    if initial_state is None:
        state = x.new_zeros(b, g, h // g, p, n)
    else:
        state = at_least_float32(initial_state).to(x.dtype).view(b, g, h // g, p, n)
    before = torch.cat([seq[:, :1, 0], last[:, :-1, 0]], 1)  # [b, c]: the document that the incoming state belongs to
    carried = cum[:, :, -1].exp() * (before == last[..., 0])[..., None, None]  # [b, c, g, k]
    incoming = []
    # unbound at once: the backward pass of a slice for each chunk would fill zeros as large as all chunks
    for carry, addition in zip(carried[..., None, None].unbind(1), added.unbind(1), strict=True):
        incoming.append(state)
        state = carry * state + addition

    # 4. What tokens read from the state that entered their chunk.
    reads = cum.exp() * (seq == before[:, :, None])[..., None, None]
    y = y + torch.einsum("bcign,bcigk,bcgkpn->bcigkp", C, reads, torch.stack(incoming, 1))

    y = y.reshape(b, l + pad, h, p)[:, :l]
    if D is not None:
        y = y + at_least_float32(D)[:, None] * at_least_float32(x_in)
    y = y.to(out_dtype)
    return (y, state.reshape(b, h, p, n)) if return_state else y


def _cumsum_by_document(x: Tensor, seq: Tensor) -> Tensor:
    """Running sums of x [b, c, q, ...] along q that start again where seq [b, c, q] changes.

    Differences of one sum over all documents would be equal in exact arithmetic, but their rounding depends on what is
    before a document, whose results would then change in the last bits. Sums of 1, 2, 4, ... tokens are combined.
    """
    shift = 1
    while shift < x.shape[2]:
        same = (seq[:, :, shift:] == seq[:, :, :-shift])[..., None, None]
        earlier = torch.where(same, x[:, :, :-shift], 0)
        x = x + F.pad(earlier, (0, 0, 0, 0, shift, 0))
        shift *= 2
    return x


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence.

    Args:
        state: [b, h, p, n]; x: [b, h, p]; dt: [b, h]; A: [h]; B, C: [b, g, n]; D: [h].

    Returns:
        y [b, h, p] in x's dtype, and the new state in the accumulation dtype.
    """
    heads_per_group = x.shape[1] // B.shape[1]
    xf, dt, A, B, C = (at_least_float32(t) for t in (x, dt, A, B, C))
    B, C = (t.repeat_interleave(heads_per_group, 1) for t in (B, C))  # [b, h, n]
    decay = (dt * A).exp()[..., None, None]
    state = at_least_float32(state) * decay + (dt[..., None] * xf)[..., None] * B[:, :, None]
    y = torch.einsum("bhpn,bhn->bhp", state, C)
    if D is not None:
        y = y + at_least_float32(D)[:, None] * xf
    return y.to(x.dtype), state
