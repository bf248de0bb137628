"""Prompts as token rows, joined from pieces that are tokenised once each.

A split repeats the same few thousand items hundreds of thousands of times. Each item is tokenised once in the middle of
a prompt (with the separator behind it) and once at its end (with the template's tail), and prompts are joined from
these pieces. Where pieces are not known to have the tokens of the whole text (``piece_borders``), the text of the
prompt is tokenised when the prompt is needed.

N prompts; P pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from tawin_nemo.data.item_tokens import check_unmarked, encode_marked, marked
from tawin_nemo.data.piece_borders import Pieces, unproven_because
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.special_tokens import bos_ids, encode_prompts
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.types import TokenRows


class PromptEncoder:
    """Tokenises histories of item indices; ``texts`` are the item texts by index.

    With ``item_tokens`` the token of an item stands behind its text (``data.item_tokens``). Raises DataError for texts
    that could not be told from its mark.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: Tokenizer, template: Template, *, item_tokens: bool = False
    ) -> None:
        self.texts = texts
        self._tokenizer, self._template, self._item_tokens = tokenizer, template, item_tokens
        if item_tokens:
            check_unmarked(texts)

    @cached_property
    def _piece_texts(self) -> tuple[list[str], list[str]]:
        """Every item in the middle of a prompt, and every item at its end."""
        written = [self._template.answer(text) for text in self.texts]
        return [text + self._template.separator for text in written], [text + self._template.tail for text in written]

    @cached_property
    def _pieces(self) -> TokenRows:
        """0 = head, 1 = prompt without items, then all items in the middle, then all items at the end."""
        middles, ends = self._piece_texts
        fronts = encode_prompts(self._tokenizer, [self._template.head, self._template.prompt([])])
        rows = TokenRows.cat([fronts, self._tokenizer.encode_batch([*middles, *ends])])
        return TokenRows(rows.flat.astype(np.int32), rows.offsets)

    @cached_property
    def from_text_because(self) -> str:
        """Why prompts are tokenised from their text; empty where pieces are known to have the same tokens."""
        template = type(self._template)
        if self._item_tokens:
            return "items have tokens of their own"
        if not self._template.joins:
            return "the template renders every prompt as a whole"
        if template.prompt is not Template.prompt or template.prompt_of is not Template.prompt_of:
            return "the template has its own way to write a prompt"
        head = self._tokenizer.encode_batch([self._template.head])
        if not len(head.flat) or len(head.flat) < len(bos_ids(self._tokenizer)):
            return "the text in front of the items has no tokens"
        (middles, ends), count = self._piece_texts, len(self.texts)
        first, of_items = self._template.head, self._pieces.take(np.arange(2, 2 + 2 * count))
        pieces = Pieces(
            [first, *middles], TokenRows.cat([head, of_items.take(np.arange(count))]), [*middles, *ends], of_items
        )
        return unproven_because(self._tokenizer.backend, pieces)

    @property
    def joins(self) -> bool:
        """Whether prompts are joined from pieces."""
        return not self.from_text_because

    def encode(self, histories: TokenRows) -> TokenRows:
        """``encode_prompts`` of the template's prompts, one per history (oldest item first)."""
        return self.join(histories) if self.joins else self.encode_full_prompts(histories)

    def encode_full_prompts(self, histories: TokenRows) -> TokenRows:
        """``encode`` by its definition, slowly: render every prompt and tokenise it."""
        rows = (histories[row].tolist() for row in range(len(histories)))
        return self._encoded([self._template.prompt_of(items, self._written(items)) for items in rows])

    def _encoded(self, prompts: Sequence[str]) -> TokenRows:
        encode = encode_marked if self._item_tokens else encode_prompts
        return encode(self._tokenizer, prompts)

    def _written(self, items: Sequence[int]) -> list[str]:
        if self._item_tokens:
            return [marked(self.texts[item], item) for item in items]
        return [self.texts[item] for item in items]

    def encode_with_candidates(self, histories: TokenRows, candidates: TokenRows) -> TokenRows:
        """Prompts that show candidates, one per history (``Template.prompt_with_candidates``)."""
        rows = ((histories[row].tolist(), candidates[row].tolist()) for row in range(len(histories)))
        return self._encoded([
            self._template.prompt_of(items, self._written(items), shown, self._written(shown)) for items, shown in rows
        ])  # fmt: skip

    def join(self, histories: TokenRows) -> TokenRows:
        """``encode`` from the pieces, whether or not these are known to have the same tokens."""
        piece_P, offsets_N = self._pieces_of(histories)
        parts = self._pieces.take(piece_P)
        return TokenRows(parts.flat, parts.offsets[offsets_N])

    def joined_lengths(self, histories: TokenRows) -> np.ndarray:
        """Tokens of each row of ``join``, [N] int64, without making the rows."""
        piece_P, offsets_N = self._pieces_of(histories)
        ends_P = np.concatenate([[0], np.cumsum(self._pieces.lengths_of(piece_P))])
        return np.diff(ends_P[offsets_N])

    def _pieces_of(self, histories: TokenRows) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the pieces of all prompts one after another [P], and where each prompt begins [N + 1]."""
        items_N, offsets_N = histories.lengths, histories.offsets + np.arange(len(histories.offsets))
        first_N, last_N = offsets_N[:-1], offsets_N[1:] - 1
        piece_P = np.zeros(int(offsets_N[-1]), dtype=np.int64)  # one piece per item, and one in front
        is_item_P = np.ones(len(piece_P), dtype=bool)
        is_item_P[first_N] = False
        piece_P[is_item_P] = 2 + histories.flat
        piece_P[last_N[items_N > 0]] += len(self.texts)
        piece_P[first_N[items_N == 0]] = 1
        return piece_P, offsets_N
