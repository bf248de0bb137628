"""Prompts as token rows, without running the tokenizer over every prompt.

A split repeats the same few thousand items hundreds of thousands of times. Each item is tokenised once in the middle
of a prompt (with the separator behind it) and once at its end (with the template's tail), and prompts are joined from
these pieces. Where a tokenizer merges across the joints, which a probe shows, whole prompts are tokenised instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.types import TokenRows

_PROBED_ROWS = 256


class PromptEncoder:
    """Tokenises histories of item indices; ``texts`` are the item texts by index."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, template: Template) -> None:
        self._texts, self._tokenizer, self._template = texts, tokenizer, template
        written = [template.answer(text) for text in texts]
        # Pieces: 0 = head, 1 = prompt without items, then all items in the middle, then all items at the end.
        self._pieces = tokenizer.encode_batch(
            [
                template.head,
                template.prompt([]),
                *(text + template.separator for text in written),
                *(text + template.tail for text in written),
            ]
        )

    def encode(self, histories: TokenRows) -> TokenRows:
        """``tokenizer.encode_batch`` of the template's prompts, one per history (oldest item first)."""
        joined = self._join(histories)
        probe = np.unique(np.linspace(0, len(histories) - 1, min(_PROBED_ROWS, len(histories))).astype(np.int64))
        expected, found = self.encode_whole(histories.take(probe)), joined.take(probe)
        if np.array_equal(found.flat, expected.flat) and np.array_equal(found.offsets, expected.offsets):
            return joined
        return self.encode_whole(histories)

    def encode_whole(self, histories: TokenRows) -> TokenRows:
        """The same by its definition: render every prompt, tokenise it."""
        return self._tokenizer.encode_batch(
            [self._template.prompt([self._texts[item] for item in histories[row]]) for row in range(len(histories))]
        )

    def _join(self, histories: TokenRows) -> TokenRows:
        items_N, offsets_N = histories.lengths, histories.offsets + np.arange(len(histories.offsets))
        first_N, last_N = offsets_N[:-1], offsets_N[1:] - 1
        piece_P = np.zeros(int(offsets_N[-1]), dtype=np.int64)  # one piece per item, and one in front
        is_item_P = np.ones(len(piece_P), dtype=bool)
        is_item_P[first_N] = False
        piece_P[is_item_P] = 2 + histories.flat
        piece_P[last_N[items_N > 0]] += len(self._texts)
        piece_P[first_N[items_N == 0]] = 1
        parts = self._pieces.take(piece_P)
        return TokenRows(parts.flat, parts.offsets[offsets_N])
