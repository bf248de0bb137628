"""A split of the dataset as token rows, ready for training, rollout and evaluation.

N samples. Prompts are made when a batch needs them (``data/prompt_index.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tawin_nemo.config.schema import DataConfig
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.lazy_rows import TokenSource
from tawin_nemo.data.prompt_encoder import PromptEncoder
from tawin_nemo.data.prompt_index import PromptIndex, index_prompts, lazy_prompts, shown_candidates
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.types import PromptBatch, TokenRows


@dataclass(frozen=True)
class Samples:
    """N encoded rows of one split: the prompt, and the item that comes next.

    ``numbers``: the row numbers in the split; None for 0 .. N - 1.
    """

    prompts: TokenSource
    target_N: np.ndarray  # item index
    user_N: np.ndarray
    history: TokenSource  # item indices that the prompt shows, oldest first
    numbers: np.ndarray | None = None
    candidates: TokenRows | None = None  # candidate set of each row, where the data have them

    def __post_init__(self) -> None:
        lengths = {len(self.prompts), len(self.target_N), len(self.user_N), len(self.history)}
        lengths |= set() if self.numbers is None else {len(self.numbers)}
        if len(lengths) != 1:
            raise ValueError(f"the columns of Samples differ in length: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def row_N(self) -> np.ndarray:
        """Row numbers in the split."""
        return np.arange(len(self.prompts), dtype=np.int64) if self.numbers is None else self.numbers

    def _numbers_of(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.numbers is None else self.numbers[rows]

    def take(self, rows: np.ndarray) -> Samples:
        """The samples at indices ``rows`` [M], in that order; they keep their row numbers in the split."""
        rows = np.asarray(rows, dtype=np.int64)
        return Samples(
            self.prompts.select(rows), self.target_N[rows], self.user_N[rows], self.history.take(rows),
            self._numbers_of(rows), None if self.candidates is None else self.candidates.take(rows),
        )  # fmt: skip

    def prompt_batch(self, rows: np.ndarray) -> PromptBatch:
        """The prompts of ``rows``, each with its own target."""
        rows = np.asarray(rows, dtype=np.int64)
        return PromptBatch(
            row_B=torch.from_numpy(self._numbers_of(rows).copy()),
            prompts=self.prompts.take(rows),
            target_B=torch.from_numpy(self.target_N[rows].astype(np.int64)),
        )


def encode_split(
    split: Split, texts: Sequence[str], tokenizer: Tokenizer, template: Template, data: DataConfig, *,
    item_tokens: bool = False,
) -> Samples:  # fmt: skip
    """The prompts of all histories, made when they are asked for; what is in memory now are two numbers per row.

    ``texts`` are the item texts by item index; with ``item_tokens`` each is followed by the token of its item
    (``data.item_tokens``). With ``data.show_candidates`` each prompt lists the candidates too. A
    history keeps its newest ``data.max_history`` items; a prompt longer than ``data.max_prompt_tokens`` then loses its
    oldest items, whole ones, until it fits.

    Raises DataError for an item that does not fit into a prompt by itself, or for candidates that are to be shown where
    the data have none.
    """
    encoder = PromptEncoder(texts, tokenizer, template, item_tokens=item_tokens)
    return samples_of(split, encoder, data, index_prompts(split, encoder, data))


def samples_of(split: Split, encoder: PromptEncoder, data: DataConfig, index: PromptIndex) -> Samples:
    """The samples of a split whose prompts ``index_prompts`` has measured."""
    prompts, history = lazy_prompts(split, encoder, shown_candidates(split, data), index)
    return Samples(prompts, split.target_N, split.user_N, history, candidates=split.candidates)
