"""Prompts in which one further token stands behind the text of every item (LLaRA, arXiv 2312.02445).

Such a token has no text and no row in the vocabulary: it is ``FIRST_ITEM_TOKEN`` plus the number of the item, and the
model puts a projected vector of the item in its place (``models/megatron/model/item_tokens.py``). A template writes the
items' texts wherever it wants; each carries a mark with its number, at which the prompt is cut into pieces. The pieces
are tokenised one by one, so that an item's token changes none beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tawin_nemo.data.special_tokens import encode_prompts
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.types import FIRST_ITEM_TOKEN, TokenRows
from tawin_nemo.util.errors import DataError

#: Characters for private use, in which no title is written.
_BEGIN, _END = "\ue000", "\ue001"
_MARK = re.compile(f"{_BEGIN}(\\d+){_END}")


def marked(text: str, item: int) -> str:
    """The text of an item with the mark of its token behind it."""
    return f"{text}{_BEGIN}{item}{_END}"


def check_unmarked(texts: Sequence[str]) -> None:
    """Raises DataError for an item text that holds one of the characters of a mark."""
    for item, text in enumerate(texts):
        if _BEGIN in text or _END in text:
            raise DataError(
                f"the text of item {item}, {text[:60]!r}, holds U+E000 or U+E001, with which model.item_tokens marks "
                "items in prompts; remove these characters from the titles"
            )


def encode_marked(tokenizer: Tokenizer, texts: Sequence[str]) -> TokenRows:
    """Token rows of N prompts whose items are ``marked``: the pieces of text, and the items' tokens between them.

    Raises DataError for text that the vocabulary cannot express.
    """
    cut = [_MARK.split(text) for text in texts]  # a piece, an item, a piece, ...
    heads = {piece: place for place, piece in enumerate(dict.fromkeys(pieces[0] for pieces in cut))}
    others = {
        piece: len(heads) + place
        for place, piece in enumerate(dict.fromkeys(piece for pieces in cut for piece in pieces[2::2]))
    }
    items = sorted({int(item) for pieces in cut for item in pieces[1::2]})
    row_of = {item: len(heads) + len(others) + place for place, item in enumerate(items)}
    parts = TokenRows.cat([
        encode_prompts(tokenizer, list(heads)), tokenizer.encode_batch(list(others)),
        TokenRows(FIRST_ITEM_TOKEN + np.array(items, dtype=np.int64), np.arange(len(items) + 1)),
    ])  # fmt: skip
    rows: list[int] = []
    for pieces in cut:
        rows.append(heads[pieces[0]])
        for item, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            rows += (row_of[int(item)], others[piece])
    joined = parts.take(np.array(rows, dtype=np.int64))
    ends = np.cumsum([0, *map(len, cut)])
    return TokenRows(joined.flat, joined.offsets[ends])
