"""One prompt template for SFT, RL, evaluation and serving.

``alpaca`` is for pretrained language models: instruction, input, response, items one per line, titles in quotes.
``compact`` is for models trained from scratch, where every token costs training time: no words, two marker tokens.
A Jinja template of one's own (``data/jinja_prompts.py``) has the same interface. The oldest item comes first, so that
the newest one stands nearest to the answer. With ``data.chat`` the tokenizer's chat template stands around the text,
which is then one user's message (``data/chat.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from tawin_nemo.config.seams import loaded
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.imports import is_import_path

#: Marker tokens of the compact template: in front of an item (once in front of all for codes) and of the answer.
ITEM_MARK, ANSWER_MARK = "<|item|>", "<|next|>"

#: The text around the instruction of the alpaca template.
ALPACA_START = (
    "The instruction below comes with an input. Write the response that carries it out.\n\n### Instruction:\n"
)
ALPACA_INPUT = "\n\n### Input:\n"

_INSTRUCTION = (
    "A customer bought the items listed in the input, from oldest to newest. "
    "Name the item that this customer will buy next."
)
_WITH_CANDIDATES = (
    "A customer chose the items listed in the input, from oldest to newest. "
    "Name the item that this customer will choose next, one of the candidates."
)
_ALPACA_CANDIDATES = "\n\n### Candidates:\n"
_ALPACA_TAIL = "\n\n### Response:\n"


@dataclass(frozen=True)
class Template:
    """Turns item texts (titles, or joined codes) into the text of a prompt and of an answer.

    ``name`` is compact or alpaca, ``kind`` is title or sid (``data.template`` and ``catalog.kind``). ``chat`` is what
    the tokenizer's chat template writes before and behind a message; empty without ``data.chat``. Raises ConfigError
    for other values.
    """

    name: str = "compact"
    kind: str = "title"
    chat: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        if self.name not in ("compact", "alpaca") and type(self) is Template:
            raise ConfigError(
                f"data.template={self.name} is not known; use compact, alpaca, a Jinja file (NAME.jinja), Jinja text "
                "with {{ }} or an import path (data.chat=true puts the tokenizer's chat template around it)"
            )
        if self.kind not in ("title", "sid"):
            raise ConfigError(f"catalog.kind={self.kind} is not known; use title or sid")

    @property
    def in_chat(self) -> bool:
        """Whether the tokenizer's chat template stands around the text."""
        return self.chat != ("", "")

    def with_chat(self, chat: tuple[str, str]) -> Self:
        """The same wording as a message of a chat."""
        return replace(self, chat=chat)

    @property
    def wording(self) -> str:
        """The built-in template whose style alignment tasks use."""
        return self.name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text that the recipe's keys do not fix; empty for the built-in templates without chat."""
        fixed = self._fixed_text()
        return hashlib.sha256(json.dumps(fixed).encode()).hexdigest() if fixed else ""

    def _fixed_text(self) -> list[str]:
        return [*self.chat] if self.in_chat else []

    @property
    def joins(self) -> bool:
        """Whether a prompt is head, items with separators between them, and tail."""
        return True

    def before_input(self, instruction: str) -> str:
        """The alpaca text in front of the items; a chat needs no headings."""
        if self.in_chat:
            return f"{self.chat[0]}{instruction}\n\n"
        return f"{ALPACA_START}{instruction}{ALPACA_INPUT}"

    @property
    def head(self) -> str:
        """The text in front of the first item."""
        return ITEM_MARK if self.name == "compact" else self.before_input(_INSTRUCTION)

    @property
    def separator(self) -> str:
        """The text between two items."""
        if self.name == "alpaca":
            return "\n"
        return ITEM_MARK if self.kind == "title" else ""

    @property
    def tail(self) -> str:
        """The text between the newest item and the answer."""
        if self.name == "compact":
            return ANSWER_MARK
        return self.chat[1] if self.in_chat else _ALPACA_TAIL

    @property
    def pieces(self) -> tuple[str, ...]:
        """The distinct fixed texts, none of them empty."""
        return tuple(dict.fromkeys(piece for piece in (self.head, self.separator, self.tail) if piece))

    @property
    def markers(self) -> tuple[str, ...]:
        """The fixed texts that must be single tokens in every tokenizer."""
        return self.pieces if self.name == "compact" else ()

    def prompt(self, history_texts: Sequence[str]) -> str:
        """The prompt for item texts ordered oldest first (an empty history is allowed)."""
        if not history_texts and self.in_chat:  # chat templates may cut white space off a message's ends
            return self.head.rstrip() + self.tail
        return self.head + self.separator.join(map(self.answer, history_texts)) + self.tail

    def prompt_of(
        self,
        items: Sequence[int],
        texts: Sequence[str],
        candidates: Sequence[int] = (),
        candidate_texts: Sequence[str] = (),
    ) -> str:
        """The prompt for a history of item indices, which have these texts; with candidates, if there are any.

        Only a Jinja template uses the indices, to look up the items' further columns.
        """
        if candidates:
            return self.prompt_with_candidates(texts, candidate_texts)
        return self.prompt(texts)

    def prompt_with_candidates(self, history_texts: Sequence[str], candidate_texts: Sequence[str]) -> str:
        """The prompt of the candidate protocol: the history, oldest first, then the candidates in their order.

        The compact template writes its answer marker between both as well, so that it needs no further token.
        """
        listed = [self.separator.join(map(self.answer, texts)) for texts in (history_texts, candidate_texts)]
        if self.name == "compact":
            return self.head + self.tail.join([*listed, ""])
        return self.before_input(_WITH_CANDIDATES) + _ALPACA_CANDIDATES.join(listed) + self.tail

    def answer(self, item_text: str) -> str:
        """The text of an item in the history and as the answer, without the end-of-text token."""
        return f'"{item_text}"' if self.name == "alpaca" and self.kind == "title" else item_text


def build_template(name: str, kind: str) -> Template:
    """The template that ``data.template`` names; an import path names a subclass of ``Template``.

    Raises ConfigError for an unknown name, or for code that cannot be imported.
    """
    made: type[Template] = loaded("data.template", name) if is_import_path(name) else Template
    return made(name, kind)
