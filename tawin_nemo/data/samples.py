"""A split of the dataset as token rows, ready for training, rollout and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tawin_nemo.config import DataConfig
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.prompt_tokens import PromptEncoder
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.errors import DataError
from tawin_nemo.log import get_logger
from tawin_nemo.types import PromptBatch, TokenRows

log = get_logger(__name__)


@dataclass(frozen=True)
class Samples:
    """N encoded rows of one split: the prompt, and the item that comes next."""

    prompts: TokenRows
    target_N: np.ndarray  # item index
    user_N: np.ndarray
    history: TokenRows  # item indices that the prompt shows, oldest first
    row_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # row number in the split

    def __post_init__(self) -> None:
        if len(self.row_N) == 0:
            object.__setattr__(self, "row_N", np.arange(len(self.prompts), dtype=np.int64))
        lengths = {len(self.prompts), len(self.target_N), len(self.user_N), len(self.history), len(self.row_N)}
        if len(lengths) != 1:
            raise ValueError(f"the columns of Samples differ in length: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: np.ndarray) -> Samples:
        """The named rows in that order; they keep their row numbers in the split."""
        rows = np.asarray(rows, dtype=np.int64)
        return Samples(
            self.prompts.take(rows), self.target_N[rows], self.user_N[rows], self.history.take(rows), self.row_N[rows]
        )

    def prompt_batch(self, rows: np.ndarray) -> PromptBatch:
        """The prompts of ``rows``, each with its own target."""
        rows = np.asarray(rows, dtype=np.int64)
        return PromptBatch(
            row_B=torch.from_numpy(self.row_N[rows]),
            prompts=self.prompts.take(rows),
            target_B=torch.from_numpy(self.target_N[rows].astype(np.int64)),
        )


def encode_split(
    split: Split, texts: Sequence[str], tokenizer: Tokenizer, template: Template, data: DataConfig
) -> Samples:
    """Write every history as a prompt, in tokens.

    ``texts`` are the item texts by item index. A history keeps its newest ``data.max_history`` items; a prompt longer
    than ``data.max_prompt_tokens`` then loses its oldest items, whole ones, until it fits.

    Raises DataError for an item that does not fit into a prompt by itself.
    """
    encoder = PromptEncoder(texts, tokenizer, template)
    kept_N = np.minimum(split.history.lengths, data.max_history)
    prompts = encoder.encode(_newest(split.history, kept_N))
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
        shorter = encoder.encode(_newest(split.history.take(too_long), kept_N[too_long]))
        prompts = _replaced(prompts, too_long, shorter)
        too_long = too_long[shorter.lengths > data.max_prompt_tokens]
    return Samples(prompts, split.target_N, split.user_N, _newest(split.history, kept_N))


def _replaced(rows: TokenRows, places: np.ndarray, by: TokenRows) -> TokenRows:
    """``rows`` with those at ``places`` exchanged."""
    both = TokenRows.joined([rows, by])
    source = np.arange(len(rows))
    source[places] = len(rows) + np.arange(len(by))
    return both.take(source)


def _newest(history: TokenRows, kept_N: np.ndarray) -> TokenRows:
    """The last ``kept_N`` entries of each row."""
    from_end = np.repeat(history.offsets[1:], history.lengths) - np.arange(len(history.flat))
    flat = history.flat[from_end <= np.repeat(kept_N, history.lengths)]
    return TokenRows(flat, np.concatenate([[0], np.cumsum(kept_N)]).astype(np.int64))


def _unfit(row: int, items: np.ndarray, needed: int, texts: Sequence[str], data: DataConfig) -> DataError:
    what = f"item {items[0]} ({texts[items[0]]!r}) alone makes a prompt" if len(items) else "a prompt without items is"
    return DataError(
        f"data.max_prompt_tokens={data.max_prompt_tokens}: {what} of {needed} tokens (row {row}); "
        f"set data.max_prompt_tokens to {needed} or more"
    )
