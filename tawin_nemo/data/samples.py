"""A split of the dataset as token rows, ready for training, rollout and evaluation.

N samples; P pieces of text, tokenised once each, of which prompts are composed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from tawin_nemo.config.schema import DataConfig
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.item_tokens import check_unmarked, encode_marked, marked
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.special_tokens import encode_prompts
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.types import PromptBatch, TokenRows
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.log import get_logger

# -- Prompts as token rows, without running the tokenizer over every prompt.
#
# A split repeats the same few thousand items hundreds of thousands of times. Each item is tokenised once in the middle
# of a prompt (with the separator behind it) and once at its end (with the template's tail), and prompts are joined from
# these pieces. Where a tokenizer merges across the joints, which a probe shows, whole prompts are tokenised instead.


log = get_logger(__name__)

#: Prompts that are tokenised both ways to detect merges across pieces.
_PROBED_ROWS = 256


class PromptEncoder:
    """Tokenises histories of item indices; ``texts`` are the item texts by index.

    With ``item_tokens`` the token of an item stands behind its text (``data.item_tokens``). Raises DataError for texts
    that could not be told from its mark.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: Tokenizer, template: Template, *, item_tokens: bool = False
    ) -> None:
        self._texts, self._tokenizer, self._template, self._item_tokens = texts, tokenizer, template, item_tokens
        if item_tokens:
            check_unmarked(texts)

    @cached_property
    def _pieces(self) -> TokenRows:
        """0 = head, 1 = prompt without items, then all items in the middle, then all items at the end."""
        tokenizer, template = self._tokenizer, self._template
        written = [template.answer(text) for text in self._texts]
        fronts = encode_prompts(tokenizer, [template.head, template.prompt([])])
        items = [*(text + template.separator for text in written), *(text + template.tail for text in written)]
        return TokenRows.cat([fronts, tokenizer.encode_batch(items)])

    def encode(self, histories: TokenRows) -> TokenRows:
        """``encode_prompts`` of the template's prompts, one per history (oldest item first)."""
        if self._item_tokens or not self._template.joins:
            return self.encode_full_prompts(histories)
        joined = self._join(histories)
        probe = np.unique(np.linspace(0, len(histories) - 1, min(_PROBED_ROWS, len(histories))).astype(np.int64))
        expected, actual = self.encode_full_prompts(histories.take(probe)), joined.take(probe)
        if np.array_equal(actual.flat, expected.flat) and np.array_equal(actual.offsets, expected.offsets):
            return joined
        return self.encode_full_prompts(histories)

    def encode_full_prompts(self, histories: TokenRows) -> TokenRows:
        """``encode`` by its definition, slowly: render every prompt and tokenise it."""
        rows = (histories[row].tolist() for row in range(len(histories)))
        return self._encoded([self._template.prompt_of(items, self._written(items)) for items in rows])

    def _encoded(self, prompts: Sequence[str]) -> TokenRows:
        encode = encode_marked if self._item_tokens else encode_prompts
        return encode(self._tokenizer, prompts)

    def _written(self, items: Sequence[int]) -> list[str]:
        if self._item_tokens:
            return [marked(self._texts[item], item) for item in items]
        return [self._texts[item] for item in items]

    def encode_with_candidates(self, histories: TokenRows, candidates: TokenRows) -> TokenRows:
        """Prompts that show candidates, one per history (``Template.prompt_with_candidates``)."""
        rows = ((histories[row].tolist(), candidates[row].tolist()) for row in range(len(histories)))
        return self._encoded([
            self._template.prompt_of(items, self._written(items), shown, self._written(shown)) for items, shown in rows
        ])  # fmt: skip

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


@dataclass(frozen=True)
class Samples:
    """N encoded rows of one split: the prompt, and the item that comes next."""

    prompts: TokenRows
    target_N: np.ndarray  # item index
    user_N: np.ndarray
    history: TokenRows  # item indices that the prompt shows, oldest first
    row_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # row number in the split
    candidates: TokenRows | None = None  # candidate set of each row, where the data have them

    def __post_init__(self) -> None:
        if len(self.row_N) == 0:
            object.__setattr__(self, "row_N", np.arange(len(self.prompts), dtype=np.int64))
        lengths = {len(self.prompts), len(self.target_N), len(self.user_N), len(self.history), len(self.row_N)}
        if len(lengths) != 1:
            raise ValueError(f"the columns of Samples differ in length: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: np.ndarray) -> Samples:
        """The samples at indices ``rows`` [M], in that order; they keep their row numbers in the split."""
        rows = np.asarray(rows, dtype=np.int64)
        return Samples(
            self.prompts.take(rows), self.target_N[rows], self.user_N[rows], self.history.take(rows), self.row_N[rows],
            None if self.candidates is None else self.candidates.take(rows),
        )  # fmt: skip

    def prompt_batch(self, rows: np.ndarray) -> PromptBatch:
        """The prompts of ``rows``, each with its own target."""
        rows = np.asarray(rows, dtype=np.int64)
        return PromptBatch(
            row_B=torch.from_numpy(self.row_N[rows]),
            prompts=self.prompts.take(rows),
            target_B=torch.from_numpy(self.target_N[rows].astype(np.int64)),
        )


def encode_split(
    split: Split, texts: Sequence[str], tokenizer: Tokenizer, template: Template, data: DataConfig, *,
    item_tokens: bool = False,
) -> Samples:  # fmt: skip
    """Tokenise the prompt of every history.

    ``texts`` are the item texts by item index; with ``item_tokens`` each is followed by the token of its item
    (``data.item_tokens``). With ``data.show_candidates`` each prompt lists the candidates too. A
    history keeps its newest ``data.max_history`` items; a prompt longer than ``data.max_prompt_tokens`` then loses its
    oldest items, whole ones, until it fits.

    Raises DataError for an item that does not fit into a prompt by itself, or for candidates that are to be shown where
    the data have none.
    """
    encoder = PromptEncoder(texts, tokenizer, template, item_tokens=item_tokens)
    shown = _shown_candidates(split, data)

    def encode(rows: np.ndarray) -> TokenRows:
        histories = _newest(split.history.take(rows), kept_N[rows])
        return (
            encoder.encode(histories) if shown is None else encoder.encode_with_candidates(histories, shown.take(rows))
        )

    kept_N = np.minimum(split.history.lengths, data.max_history)
    prompts = encode(np.arange(len(split)))
    too_long = np.flatnonzero(prompts.lengths > data.max_prompt_tokens)
    if len(too_long):
        log.info(
            "%d of %d prompts exceed data.max_prompt_tokens=%d and lose their oldest items",
            len(too_long), len(prompts), data.max_prompt_tokens,
        )  # fmt: skip
    while len(too_long):
        alone = too_long[kept_N[too_long] <= 1]
        if len(alone):
            row = int(alone[0])
            raise _unfit(row, split.history[row][-1:], int(prompts.lengths[row]), texts, data)
        kept_N[too_long] -= 1
        shorter = encode(too_long)
        prompts = _replaced(prompts, too_long, shorter)
        too_long = too_long[shorter.lengths > data.max_prompt_tokens]
    history = _newest(split.history, kept_N)
    return Samples(prompts, split.target_N, split.user_N, history, candidates=split.candidates)


def _shown_candidates(split: Split, data: DataConfig) -> TokenRows | None:
    """The candidates that prompts list; None where they list none."""
    if not data.show_candidates:
        return None
    if split.candidates is None:
        raise DataError(
            f"data.show_candidates=true, but the data in data.root={data.root} have no candidate sets; set it to "
            "false, or name data with candidates (data.dataset=candidates)"
        )
    return split.candidates


def _replaced(rows: TokenRows, positions: np.ndarray, by: TokenRows) -> TokenRows:
    """A copy of ``rows`` with those at ``positions`` replaced by ``by``."""
    both = TokenRows.cat([rows, by])
    source = np.arange(len(rows))
    source[positions] = len(rows) + np.arange(len(by))
    return both.take(source)


def _newest(history: TokenRows, kept_N: np.ndarray) -> TokenRows:
    """The last ``kept_N`` entries of each row."""
    from_end = np.repeat(history.offsets[1:], history.lengths) - np.arange(len(history.flat))
    flat = history.flat[from_end <= np.repeat(kept_N, history.lengths)]
    return TokenRows(flat, np.concatenate([[0], np.cumsum(kept_N)]).astype(np.int64))


def _unfit(row: int, items: np.ndarray, needed: int, texts: Sequence[str], data: DataConfig) -> DataError:
    text = texts[items[0]] if len(items) else ""
    shown = repr(text) if len(text) <= 60 else f"{text[:60]!r}..., {len(text):,} characters"
    what = f"item {items[0]} ({shown}) alone makes a prompt" if len(items) else "a prompt without items is"
    shorter = ", or drop such titles: prepare.max_title_chars, prepare.max_title_words" if len(text) > 200 else ""
    return DataError(
        f"data.max_prompt_tokens={data.max_prompt_tokens}: {what} of {needed} tokens (row {row}); "
        f"set data.max_prompt_tokens to {needed} or more{shorter}"
    )
