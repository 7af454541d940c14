"""Continuing prompts with a trainer-side model: prefill in chunks, then one token a step, memory constant."""

import torch
from torch import Tensor

from megatron_taipan.errors import UserError
from megatron_taipan.inference.sampling import Sampling, choose
from megatron_taipan.inference.stepping import Stepper
from megatron_taipan.model.taipan import Taipan


@torch.inference_mode()
def generate(
    model: Taipan,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: tuple[int, ...] = (),
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """Continues each prompt until a stop token or `max_new_tokens`.

    Prompts of different lengths share one batch: shorter ones are padded on the left and the padding is its
    own document (seq_idx), which no other token sees. A row that has stopped leaves the batch.

    Args:
        prompts: token ids, each with at least one token.
        stop_tokens: a row ends with the first of these that it produces.
        prefill_chunk: tokens of each prompt per forward pass; bounds the memory, changes nothing else. None:
            `usual_chunk`.

    Returns:
        The new tokens of each prompt, a stop token included.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, a chunk below 1.
    """
    sampling = sampling or Sampling()
    check_prompts(model, prompts)
    if prefill_chunk is None:
        prefill_chunk = usual_chunk(next(model.parameters()).device, len(prompts))
    if prefill_chunk < 1 or max_new_tokens < 0:
        raise UserError(
            f"prefill_chunk={prefill_chunk} must be at least 1 and max_new_tokens={max_new_tokens} at least 0"
        )
    was_training = model.training
    model.eval()
    try:
        return _generate(model, prompts, max_new_tokens, sampling, stop_tokens, prefill_chunk)
    finally:
        model.train(was_training)


def _generate(
    model: Taipan,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    prefill_chunk: int,
) -> list[list[int]]:
    weight = next(model.parameters())
    device = weight.device
    tokens, documents = pad_left(prompts, device)  # [b, l] each
    cache = model.new_cache(len(prompts), device, weight.dtype)
    logits = prefill(model, tokens, documents, cache, prefill_chunk)  # [b, v]

    stepper = Stepper(model, cache)
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=device)
    _mark_prompts(seen, prompts)
    generators = [torch.Generator().manual_seed(_row_seed(sampling.seed, row)) for row in range(len(prompts))]
    rows = list(range(len(prompts)))  # which prompt each row of the batch continues
    results: list[list[int]] = [[] for _ in prompts]
    for step in range(max_new_tokens):
        chosen = choose(logits, seen, sampling, [generators[row] for row in rows])  # [b]
        seen.scatter_(1, chosen[:, None], True)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            results[row].append(token)
        alive = [at for at, row in enumerate(rows) if results[row][-1] not in stop_tokens]
        if not alive or step == max_new_tokens - 1:
            break
        if len(alive) < len(rows):
            kept = torch.tensor(alive, device=device)
            cache.select(kept)
            seen, chosen = seen[kept], chosen[kept]
            rows = [rows[at] for at in alive]
        logits = stepper.step(chosen[:, None])
    return results


def usual_chunk(device: torch.device, rows: int = 1) -> int:
    """Tokens of each row that a pass of a prefill reads where nobody says otherwise.

    A GPU waits for the launches of a pass over few tokens: with taipan_1.3b on an H200 2,048 take 51 ms, 8,192 take 55.
    On a CPU, which does not wait, a longer pass would only take more memory.
    """
    return max(2048, 8192 // rows) if device.type == "cuda" else 2048


def prefill(model: Taipan, tokens: Tensor, documents: Tensor, cache, chunk: int) -> Tensor:
    """Feeds [b, l] tokens to the cache in chunks; returns the logits [b, v] after the last."""
    logits = None
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        logits = model(tokens[:, part], seq_idx=documents[:, part], cache=cache, all_logits=False).logits[:, -1]
    assert logits is not None
    return logits


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [b, l] int64 with 0 as padding on the left, and documents [b, l] int32: 0 padding, 1 prompt."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    documents = torch.zeros(len(prompts), longest, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        documents[row, longest - len(prompt) :] = 1
    return tokens.to(device), documents.to(device)


def check_prompts(model: Taipan, prompts: list[list[int]]) -> None:
    """Refuses what cannot be continued.

    Raises:
        UserError: no prompt, an empty one, or an id outside the vocabulary.
    """
    if not prompts:
        raise UserError("no prompt to continue was given")
    size = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} has no token; give at least the document separator")
        if min(prompt) < 0 or max(prompt) >= size:
            bad = next(token for token in prompt if not 0 <= token < size)
            raise UserError(f"prompt {row} holds the token id {bad}, outside the model's vocabulary of {size}")


def _mark_prompts(seen: Tensor, prompts: list[list[int]]) -> None:
    """Marks the tokens of every prompt, padding excluded, in [b, v]."""
    for row, prompt in enumerate(prompts):
        seen[row, torch.tensor(prompt, device=seen.device)] = True


def _row_seed(seed: int, row: int) -> int:
    """Distinct seeds for the rows of a batch; row 0 uses the seed itself."""
    return (seed + row * 0x9E3779B97F4A7C15) % 2**63
