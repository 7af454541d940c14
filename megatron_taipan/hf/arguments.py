"""The keyword arguments of transformers' models beyond those that Taipan's classes name: which are read, which are not
needed, which ask for what Taipan cannot do. An argument that is in no list is refused: if ignored, a misspelt mask or a
cache under a new name would silently change the text."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

READ = {"position_ids", "num_items_in_batch"}  # named by no signature: generate() and Trainer look for them otherwise

# Ignored, because what they give is already known.
NOT_NEEDED = {
    "cache_position",  # generate() before 5.1: the cache counts its tokens itself
    "max_length_q",  # the four of DataCollatorWithFlattening for FlashAttention repeat where its documents begin,
    "max_length_k",  # which its position_ids or seq_idx say
    "cu_seq_lens_q",
    "cu_seq_lens_k",
}

# Accepted only as None or False, by which callers say that they do not need it (PEFT passes several as None).
UNSUPPORTED = {
    "output_attentions": "attention weights are never computed as a whole",
    "output_router_logits": "there is no router; the gates' statistics come from megatron_taipan's own model",
    "shift_labels": "pass `labels` in the order of the tokens, unshifted; they are shifted here",
    "token_type_ids": "there are no token types; make the tokenizer return input_ids and attention_mask only",
}


def check_arguments(forward: Callable, given: dict[str, Any]) -> None:
    """Accepts the keyword arguments that `forward` does not name, or refuses one.

    Args:
        given: those arguments, with their values.

    Raises:
        TypeError: an argument that neither Taipan nor transformers knows.
        ValueError: one that asks for what Taipan cannot do.
    """
    for name, value in given.items():
        if name in READ | NOT_NEEDED:
            continue
        if name in UNSUPPORTED:
            if value is not None and value is not False:
                raise ValueError(f"Taipan does not support {name}: {UNSUPPORTED[name]}")
        elif name == "is_causal":
            if value is False:
                raise ValueError("Taipan does not support is_causal=False: its states run one way only")
        else:
            known = {*inspect.signature(forward).parameters, *READ, *NOT_NEEDED, *UNSUPPORTED} - {"kwargs"}
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0)[0]
            raise TypeError(f"Taipan does not know the argument {name!r}; the nearest is {near!r}")
