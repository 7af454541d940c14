"""The refinement of a selective attention layer: the selected tokens move towards their attention output."""

from torch import Tensor


def refine_reference(
    h: Tensor, o: Tensor, weight: Tensor, *, zero_is_unselected: bool = False, add: bool = False
) -> Tensor:
    """h + weight (o - h), token by token (arXiv 2410.18572, section 3.2); with `add` h + weight o.

    Args:
        h: [..., d] the residual stream; o: [..., d] attention output, of any floating type.
        weight: [...] of h's dtype; a token with weight 0 keeps h bit for bit, whatever its o is.
        zero_is_unselected: where the weight is 0 its gradient is not needed, so that o and h need not be read there.

    Returns:
        [..., d] in h's dtype.
    """
    return h + weight[..., None] * (o if add else o - h)
