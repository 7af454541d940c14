"""A chat template (jinja) for an export, tried on a short conversation before anything is written."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_taipan.errors import UserError

CHAT_TEMPLATE_FILE = "chat_template.jinja"  # where transformers 5 looks for it
SAMPLE = [
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight of them."},
    {"role": "user", "content": "And an ant?"},
]


def read_template(path: Path, special: dict[str, str]) -> tuple[str, str]:
    """A template, and what it makes of the sample conversation and the beginning of an answer.

    Args:
        special: the tokenizer's special tokens by kind (`eos_token`, ...), which the template may name.

    Raises:
        UserError: the file cannot be read, is not a template, fails on the sample, or leaves out what was said.
    """
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template {path} cannot be read: {error}") from error
    try:
        options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, **special}
        rendered: Any = render_jinja_template([SAMPLE], **options)[0][0]
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template {path} is not valid jinja: line {error.lineno}: {error.message}") from error
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the chat template {path} fails on a conversation of user, assistant, user: {reason}"
        ) from error
    lost = [message["content"] for message in SAMPLE if message["content"] not in rendered]
    if lost:
        raise UserError(
            f"the chat template {path} leaves out {len(lost)} of the {len(SAMPLE)} messages of a conversation of user,"
            f" assistant, user (first {lost[0]!r}); it must write each `message.content` of `messages`"
        )
    return template, rendered
