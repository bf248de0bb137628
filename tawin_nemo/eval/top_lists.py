"""The best items of users, for lists that are handed out: searched as evaluation searches, with filters.

I: items of the catalog; N: rows; K: entries of a list; M: items of a filter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.evaluate import CHUNK_ROWS
from tawin_nemo.rollout.assist import histories_for
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.types import NO_ITEM, TokenRows

#: Items that the filters of one search list in all: 256 MiB.
MOST_LISTED = 1 << 25


@dataclass(frozen=True, eq=False)
class Allowed:
    """Which items lists may hold: those of ``allowed_I`` (None = all), and with ``unseen`` none of the history."""

    catalog: Catalog
    allowed_I: np.ndarray | None = None
    unseen: bool = False

    def filters(self, histories: TokenRows) -> list[ItemFilter] | None:
        """One filter per history of item indices; None where nothing is filtered."""
        if not self.unseen:
            return None if self._shared is None else [self._shared] * len(histories)
        trie = self.catalog.trie
        return [self._without(trie.spans.rank_I[np.unique(histories[row])]) for row in range(len(histories))]

    @property
    def rows_at_once(self) -> int:
        """Rows whose filters fit into the memory of one search."""
        listed = 1 if self._shared is None or not self.unseen else len(self._shared.rank_M)
        return max(1, MOST_LISTED // max(1, listed))

    @cached_property
    def _shared(self) -> ItemFilter | None:
        """The filter of ``allowed_I``, in its shorter form."""
        if self.allowed_I is None or self.allowed_I.all():
            return None
        return shorter_filter(self.catalog.trie, self.allowed_I)

    def _without(self, rank_M: np.ndarray) -> ItemFilter:
        """``_shared`` without the items that have these ranks."""
        if self._shared is None:
            return ItemFilter("except", np.sort(rank_M))
        if self._shared.kind == "only":
            return ItemFilter("only", np.setdiff1d(self._shared.rank_M, rank_M))
        return ItemFilter("except", np.union1d(self._shared.rank_M, rank_M))


def shorter_filter(trie: TokenTrie, allowed_I: np.ndarray) -> ItemFilter:
    """The filter that allows the items of bool [I]; it lists those or the others, whichever are fewer."""
    allowed, forbidden = np.flatnonzero(allowed_I), np.flatnonzero(~allowed_I)
    if len(allowed) <= len(forbidden):
        return ItemFilter.only(trie, allowed.tolist())
    return ItemFilter.without(trie, forbidden.tolist())


@dataclass(frozen=True, eq=False)
class TopLists:
    """Lists of N rows, best first: ``item_NK`` is NO_ITEM behind the end of a list."""

    item_NK: np.ndarray
    score_NK: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Entries of each list [N]."""
        return (self.item_NK != NO_ITEM).sum(axis=1)


def list_chunks(samples: Samples, engine: Engine, allowed: Allowed) -> list[np.ndarray]:
    """Rows of ``samples`` that are searched together; longest prompts first, as evaluation orders them."""
    by_length = np.argsort(-samples.prompts.lengths, kind="stable")
    size = min(CHUNK_ROWS * engine.num_replicas, allowed.rows_at_once)
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def search_lists(
    engine: Engine, samples: Samples, rows: np.ndarray, *, n: int, width: int, token_budget: int, min_score: float,
    allowed: Allowed, seen: TokenRows,
) -> TopLists:  # fmt: skip
    """The best ``n`` items of ``rows`` out of a search with ``width`` beams, without those below ``min_score``.

    ``seen``: the whole history of every row of ``samples``, of which the prompt may show the end alone. ``min_score``
    0 keeps all. Errors are those of the engine's search.
    """
    filters = allowed.filters(seen.take(rows))
    options = {} if filters is None else {"filters": filters}
    options |= histories_for(engine, samples.history, rows)
    found = engine.search(samples.prompts.take(rows), width, token_budget=token_budget, **options)
    item_NK, score_NK = found.items_BW[:, :n].cpu().numpy().copy(), found.scores_BW[:, :n].cpu().numpy()
    if filters is not None:
        _name_allowed(item_NK, found.leaf_BW[:, :n].cpu().numpy(), allowed.catalog, filters)
    if min_score:
        item_NK[score_NK < min_score] = NO_ITEM
    return TopLists(item_NK, score_NK)


def _name_allowed(
    item_NK: np.ndarray, leaf_NK: np.ndarray, catalog: Catalog, filters: Sequence[ItemFilter]
) -> None:  # fmt: skip
    """Name an entry whose path several items share by the first of them that its row's filter allows."""
    for row, place in _on_shared_paths(item_NK, catalog):
        item_NK[row, place] = filters[row].first_allowed(catalog.trie, int(leaf_NK[row, place]))


def _on_shared_paths(item_NK: np.ndarray, catalog: Catalog) -> Iterator[tuple[int, int]]:
    there_NK = item_NK != NO_ITEM
    sharing_NK = there_NK & (catalog.sharing_I[np.where(there_NK, item_NK, 0)] > 1)
    yield from zip(*map(np.ndarray.tolist, np.nonzero(sharing_NK)), strict=True)
