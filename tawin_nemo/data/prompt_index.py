"""What a process knows of each prompt of a split: how many items it shows, and how many tokens it has.

Two numbers of four bytes per row. They decide which items fit into ``data.max_prompt_tokens``, and they balance the
shares of replicas. The prompts themselves are made when a batch needs them (``LazyPrompts``).

N rows of the split, M rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tawin_nemo.config.schema import DataConfig
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.lazy_rows import LazyRows, NewestEntries, TokenSource, newest
from tawin_nemo.data.prompt_encoder import PromptEncoder
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: Prompts that are tokenised both ways, to find out whether their pieces have other tokens after all.
PROBED_ROWS = 256
#: Rows that are measured at once; texts take far more memory than pieces.
_JOINED_ROWS, _TEXT_ROWS = 1 << 16, 1 << 12


@dataclass(frozen=True)
class PromptIndex:
    """Kept items and tokens of N prompts.

    ``from_text``: prompts are tokenised from their text, as their pieces are not known to have the same tokens.
    ``cuts``: some prompt shows fewer items than its history has.
    """

    kept_N: np.ndarray  # int32: the newest items that the prompt shows
    length_N: np.ndarray  # int32: tokens of the prompt
    from_text: bool
    cuts: bool
    longest: int  # tokens of the longest prompt
    num_tokens: int  # tokens of all prompts


@dataclass(frozen=True)
class LazyPrompts(LazyRows):
    """The prompts of N histories, made when they are asked for; equal to ``PromptEncoder.encode_full_prompts``.

    ``history`` are the items that prompts show, oldest first; ``candidates`` those that they list, if they list any.
    """

    encoder: PromptEncoder
    history: TokenSource
    candidates: TokenRows | None
    index: PromptIndex

    def __len__(self) -> int:
        return len(self.history)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, 0 without rows."""
        return self.index.longest

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts together."""
        return self.index.num_tokens

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the prompts with indices ``rows`` [M], int64."""
        return self.index.length_N[rows].astype(np.int64)

    def take(self, rows: np.ndarray) -> TokenRows:
        """The prompts with indices ``rows`` [M], in that order, in memory."""
        histories = self.history.take(rows)
        if self.candidates is not None:
            return self.encoder.encode_with_candidates(histories, self.candidates.take(rows))
        return self.encoder.encode_full_prompts(histories) if self.index.from_text else self.encoder.join(histories)


def lazy_prompts(
    split: Split, encoder: PromptEncoder, shown: TokenRows | None, index: PromptIndex
) -> tuple[LazyPrompts, TokenSource]:
    """The prompts of ``split``, and the part of its histories that they show. ``shown``: ``shown_candidates``."""
    history: TokenSource = NewestEntries(split.history, index.kept_N) if index.cuts else split.history
    return LazyPrompts(encoder, history, shown, index), history


def shown_candidates(split: Split, data: DataConfig) -> TokenRows | None:
    """The candidates that prompts list; None where they list none. Raises DataError where the data have none."""
    if not data.show_candidates:
        return None
    if split.candidates is None:
        raise DataError(
            f"data.show_candidates=true, but the data in data.root={data.root} have no candidate sets; set it to "
            "false, or name data with candidates (data.dataset=candidates)"
        )
    return split.candidates


def index_prompts(split: Split, encoder: PromptEncoder, data: DataConfig, file: Path | None = None) -> PromptIndex:
    """Measure the prompts of ``split``, in memory or in a new ``file``, which ``open_index`` reads.

    A history keeps its newest ``data.max_history`` items; a prompt longer than ``data.max_prompt_tokens`` then loses
    its oldest items, whole ones, until it fits. Rows are measured in parts, so that memory does not grow with them.

    Raises DataError for an item that does not fit into a prompt by itself, or for candidates that are to be shown where
    the data have none.
    """
    measure = _Measure(split, encoder, data, shown_candidates(split, data))
    from_text, count = measure.from_text(), len(split)
    both_2N = _numbers(file, count)
    size = _TEXT_ROWS if from_text else _JOINED_ROWS
    too_long = longest = tokens = cut = 0
    for start in range(0, count, size):
        rows = np.arange(start, min(start + size, count))
        kept_M, length_M, shortened = measure.fitting(rows, from_text=from_text)
        both_2N[0, rows], both_2N[1, rows] = kept_M, length_M
        longest, tokens = max(longest, int(length_M.max())), tokens + int(length_M.sum())
        too_long, cut = too_long + shortened, cut + int((kept_M < split.history.lengths_of(rows)).sum())
    if too_long:
        log.info(
            "%d of %d prompts exceed data.max_prompt_tokens=%d and lose their oldest items",
            too_long, count, data.max_prompt_tokens,
        )  # fmt: skip
    if isinstance(both_2N, np.memmap):
        both_2N.flush()
    return PromptIndex(both_2N[0], both_2N[1], from_text, cut > 0, longest, tokens)


def measured(history: TokenSource, encoder: PromptEncoder, shown: TokenRows | None) -> LazyPrompts:
    """The prompts of whole histories, however long they are; what is in memory are two numbers per row."""
    none = np.broadcast_to(np.int64(0), len(history))
    split = Split(none, history.in_memory(), none, none, shown)
    limits = DataConfig(max_history=1 << 30, max_prompt_tokens=1 << 30, show_candidates=shown is not None)
    return lazy_prompts(split, encoder, shown, index_prompts(split, encoder, limits))[0]


def open_index(file: Path, like: PromptIndex) -> PromptIndex:
    """What ``index_prompts`` wrote into ``file``, mapped into memory; ``like`` has everything but the arrays."""
    count = file.stat().st_size // 8
    both_2N = np.asarray(np.memmap(file, np.int32, "r", shape=(2, count))) if count else np.zeros((2, 0), np.int32)
    return PromptIndex(both_2N[0], both_2N[1], like.from_text, like.cuts, like.longest, like.num_tokens)


def _numbers(file: Path | None, count: int) -> np.ndarray:
    if file is None:
        return np.empty((2, count), np.int32)
    if not count:
        file.touch()
        return np.empty((2, 0), np.int32)
    return np.memmap(file, np.int32, "w+", shape=(2, count))


@dataclass(frozen=True)
class _Measure:
    split: Split
    encoder: PromptEncoder
    data: DataConfig
    shown: TokenRows | None

    def from_text(self) -> bool:
        """Whether prompts are tokenised from their text: without a proof, or where some rows refute it."""
        if self.shown is not None or not len(self.split):
            return True
        if not self.encoder.joins:
            log.info("prompts are tokenised from their text: %s", self.encoder.from_text_because)
            return True
        count = len(self.split)
        probe = np.unique(np.linspace(0, count - 1, min(PROBED_ROWS, count)).astype(np.int64))
        kept_M = np.minimum(self.split.history.lengths_of(probe), self.data.max_history)
        histories = newest(self.split.history, probe, kept_M)
        expected, actual = self.encoder.encode_full_prompts(histories), self.encoder.join(histories)
        if np.array_equal(actual.flat, expected.flat) and np.array_equal(actual.offsets, expected.offsets):
            return False
        log.warning("joined pieces of prompts have other tokens than their text, from which all are tokenised now")
        return True

    def fitting(self, rows: np.ndarray, *, from_text: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """Kept items and tokens of the prompts ``rows`` [M], and how many of them had to be shortened."""
        kept_M = np.minimum(self.split.history.lengths_of(rows), self.data.max_history)
        length_M = self._lengths(rows, kept_M, from_text)
        too_long = np.flatnonzero(length_M > self.data.max_prompt_tokens)
        shortened = len(too_long)
        while len(too_long):
            alone = too_long[kept_M[too_long] <= 1]
            if len(alone):
                row = int(rows[alone[0]])
                raise _unfit(row, self.split.history[row][-1:], int(length_M[alone[0]]), self.encoder.texts, self.data)
            kept_M[too_long] -= 1
            length_M[too_long] = self._lengths(rows[too_long], kept_M[too_long], from_text)
            too_long = too_long[length_M[too_long] > self.data.max_prompt_tokens]
        return kept_M, length_M, shortened

    def _lengths(self, rows: np.ndarray, kept_M: np.ndarray, from_text: bool) -> np.ndarray:
        histories = newest(self.split.history, rows, kept_M)
        if self.shown is not None:
            return self.encoder.encode_with_candidates(histories, self.shown.take(rows)).lengths
        if from_text:
            return self.encoder.encode_full_prompts(histories).lengths
        return self.encoder.joined_lengths(histories)


def _unfit(row: int, items: np.ndarray, needed: int, texts: Sequence[str], data: DataConfig) -> DataError:
    text = texts[items[0]] if len(items) else ""
    shown = repr(text) if len(text) <= 60 else f"{text[:60]!r}..., {len(text):,} characters"
    what = f"item {items[0]} ({shown}) alone makes a prompt" if len(items) else "a prompt without items is"
    shorter = ", or drop such titles: prepare.max_title_chars, prepare.max_title_words" if len(text) > 200 else ""
    return DataError(
        f"data.max_prompt_tokens={data.max_prompt_tokens}: {what} of {needed} tokens (row {row}); "
        f"set data.max_prompt_tokens to {needed} or more{shorter}"
    )
