"""A tiktoken file (Llama-3's tokenizer.model) as a tokenizers-library tokenizer.

The file holds one token a line, base64 and rank. tiktoken joins the pair of neighbours whose joined bytes have the
lowest rank; the tokenizers library wants the pairs themselves, so each token is made of its bytes as tiktoken makes it.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from megatron_taipan.tokenizer.byte_level import byte_letters
from megatron_taipan.tokenizer.tiktoken_file import LLAMA3_PATTERN, LLAMA3_SPECIAL, read_ranks


def convert_tiktoken(path: Path) -> Tokenizer:
    """A tokenizer with the file's tokens and ids, the special ones included.

    Raises:
        UserError: the file is not a tiktoken file.
    """
    ranks = read_ranks(path)
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    pairs = [(token, *merge_pair(token, ranks)) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    merges = [(spell(left), spell(right)) for _, left, right in pairs if right]
    # ignore_merges: like tiktoken, a whole piece of text that is a token is taken before any joining
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in LLAMA3_SPECIAL])
    tokenizer.encode_special_tokens = True
    return tokenizer


def merge_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that tiktoken joins into the token; the second is empty where it comes to no two.

    Whatever stands beside the token, its bytes are joined in the order in which they are by themselves, as long as
    nothing is joined across its borders. The ranks on the way may be above the token's own.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = enumerate(zip(parts, parts[1:], strict=False))
        joined = {at: ranks[left + right] for at, (left, right) in pairs if left + right in ranks}
        if not joined:
            return token, b""
        lowest = min(joined, key=joined.__getitem__)  # of equal ones the first
        parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
    return parts[0], parts[1]
