"""Searches over a part of the catalog: an edge below which nothing is allowed is never taken.

Log-probs stay those of the whole catalog (trie space is not normalised anew), so that scores of filtered and
unfiltered searches can be compared. A filtered search is the search that one would get if the model gave every path
without an allowed item probability 0: no allowed item is crowded out by forbidden ones, and with at least as many
beams as there are allowed paths the result is the exact ranking of the allowed items.

M listed items of one filter, X those of all filters, R filters, D distinct paths.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie


@dataclass(frozen=True, eq=False)
class ItemFilter:
    """``only`` the listed items are allowed, or all ``except`` them. A path is allowed if any of its items is."""

    kind: str  # only | except
    rank_M: np.ndarray  # sorted distinct ranks (``catalog.trie_arrays.Spans``)

    @classmethod
    def only(cls, trie: TokenTrie, items: Collection[int]) -> ItemFilter:
        """A filter that allows the paths of ``items`` (item indices) and nothing else."""
        return cls("only", _ranks(trie, items))

    @classmethod
    def without(cls, trie: TokenTrie, items: Collection[int]) -> ItemFilter:
        """A filter that allows every path but those all of whose items are in ``items`` (item indices)."""
        return cls("except", _ranks(trie, items))

    def allowed_paths(self, trie: TokenTrie) -> int:
        """Number of distinct paths that at least one allowed item has."""
        ends_D = np.append(np.flatnonzero(trie.arrays.node_depth[trie.num_inner :]), trie.num_items)
        listed_D = np.diff(np.searchsorted(self.rank_M, ends_D))
        if self.kind == "only":
            return int((listed_D > 0).sum())
        return int((listed_D < np.diff(ends_D)).sum())

    def first_allowed(self, trie: TokenTrie, leaf: int) -> int:
        """The allowed item with the lowest index at ``leaf``. Raises IndexError if the filter allows none."""
        items = trie.items(leaf)
        listed = np.isin(trie.spans.rank_I[items], self.rank_M)
        return int(items[listed if self.kind == "only" else ~listed][0])


def _ranks(trie: TokenTrie, items: Collection[int]) -> np.ndarray:
    return np.unique(trie.spans.rank_I[np.fromiter(items, dtype=np.int64, count=len(items))])


def rejoined(
    present: Filters | None, used_B: Tensor, added: Sequence[ItemFilter | None]
) -> tuple[list[ItemFilter], Tensor, Tensor]:
    """The filters that running prompts use (rows ``used_B`` of ``present``, -1 = none), then those of new prompts.

    Also the rows of the running prompts in this list, and those of the new ones.
    """
    kept: list[ItemFilter] = []
    row_of: dict[int, int] = {}

    def row(item: ItemFilter | None) -> int:
        if item is None:
            return -1
        if id(item) not in row_of:  # prompts that are given the same filter share it
            row_of[id(item)] = len(kept)
            kept.append(item)
        return row_of[id(item)]

    used = [row(None if present is None or old < 0 else present.filters[old]) for old in used_B.tolist()]
    new = [row(item) for item in added]
    return (
        kept,
        torch.tensor(used, dtype=torch.long, device=used_B.device),
        torch.tensor(new, dtype=torch.long, device=used_B.device),
    )


class Filters:
    """The filters of several prompts, applied together; row r is the r-th filter, row -1 allows every item."""

    def __init__(self, trie: TokenTrie, filters: Sequence[ItemFilter], device: torch.device) -> None:
        self.filters, self._trie = list(filters), trie
        self._stride = trie.num_items + 1
        keys = [row * self._stride + item.rank_M for row, item in enumerate(self.filters)]
        self._key_X = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *keys])).to(device)
        self._only_R = torch.tensor([item.kind == "only" for item in self.filters], device=device)
        spans = trie.spans.tensors(device)
        self._first_V, self._end_V = spans["first_V"], spans["end_V"]

    def blocked(self, row_E: Tensor, node_E: Tensor) -> Tensor:
        """Bool [E]: no item below the node is allowed by the row's filter."""
        filter_E = row_E.clamp(min=0)
        first_E, end_E = self._first_V.index_select(0, node_E), self._end_V.index_select(0, node_E)
        base_E = filter_E * self._stride
        listed_E = torch.searchsorted(self._key_X, base_E + end_E) - torch.searchsorted(self._key_X, base_E + first_E)
        none_E = torch.where(self._only_R.index_select(0, filter_E), listed_E == 0, listed_E == end_E - first_E)
        return none_E & (row_E >= 0)
