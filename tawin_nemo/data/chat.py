"""The tokenizer's chat template around a prompt: what it writes before and behind one user's message.

The text is found once, from ``apply_chat_template`` itself, and put around every prompt. Rendering it for each prompt
would give the same text, slowly, and a template that writes the date would give another text every day.
"""

from __future__ import annotations

from collections.abc import Sequence

from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.util.errors import ConfigError

_MESSAGE = "THE-PROMPT-OF-A-CUSTOMER"


def chat_frame(tokenizer: Tokenizer) -> tuple[str, str]:
    """The text in front of a user's message and the text behind it, where the assistant's answer begins.

    Raises ConfigError for a tokenizer without a chat template, and for a template that changes the message.
    """
    if not getattr(tokenizer.fast, "chat_template", None):
        raise ConfigError(
            "data.chat=true, but the tokenizer has no chat template: use the tokenizer of an Instruct model "
            "(tokenizer_config.json or chat_template.jinja beside it), or data.chat=false"
        )
    text = rendered(tokenizer, _MESSAGE)
    if text.count(_MESSAGE) != 1:
        raise ConfigError(
            f"data.chat=true, but the tokenizer's chat template writes a user's message {text.count(_MESSAGE)} times; "
            "set data.chat=false, and write the whole prompt as data.template (Jinja)"
        )
    before, behind = text.split(_MESSAGE)
    return before, behind


def rendered(tokenizer: Tokenizer, message: str) -> str:
    """The prompt that transformers' ``apply_chat_template`` makes of one user's message, ready for the answer."""
    messages = [{"role": "user", "content": message}]
    try:
        return str(tokenizer.fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # Jinja's, and what a template raises by itself
        raise ConfigError(
            f"data.chat=true, but the tokenizer's chat template fails for one message: {error}"
        ) from error


def check_frame(tokenizer: Tokenizer, chat: tuple[str, str], prompts: Sequence[str]) -> None:
    """Raises ConfigError when the chat template writes one of these prompts in another way than ``chat`` around it."""
    for prompt in prompts:
        message = prompt[len(chat[0]) : len(prompt) - len(chat[1])]
        if rendered(tokenizer, message) != f"{chat[0]}{message}{chat[1]}":
            raise ConfigError(
                "data.chat=true, but the tokenizer's chat template changes the message "
                f"{message[:200]!r}; set data.chat=false, and write the whole prompt as data.template (Jinja)"
            )
