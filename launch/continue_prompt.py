"""Continues a prompt with an exported folder, as someone who has only transformers would.

python launch/continue_prompt.py FOLDER "PROMPT" [NEW_TOKENS]
"""

import sys
from typing import Any


def main(folder: str, prompt: str, new_tokens: int = 60) -> None:
    """Loads the folder and prints the prompt with its continuation."""
    # None makes an import fail: whatever answers here comes from the folder, even where this project is installed.
    for ours in ("megatron_taipan", "checkpoints", "data_prep"):
        sys.modules[ours] = None  # type: ignore[assignment]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=new_tokens, do_sample=True, temperature=0.8, top_p=0.95)
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
