"""Lists with filters against the full ranking of the same engine, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.top_lists import Allowed, list_chunks, search_lists, shorter_filter
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.filters import ItemFilter, rejoined
from tawin_nemo.types import NO_ITEM, TokenRows
from tests.rollout.sequence_lm import TableLM

EOS, VOCAB, ROWS = 1, 9, 12
#: Items 1 and 4 are written alike.
PATHS = [[2, 3, EOS], [2, 4, EOS], [5, EOS], [6, 6, 7, EOS], [2, 4, EOS], [8, EOS], [7, 2, EOS]]
ITEMS = len(PATHS)


def scene() -> tuple[RolloutEngine, Samples, TokenRows]:
    paths = TokenRows.from_lists(PATHS)
    names = [f"item {item}" for item in range(ITEMS)]
    catalog = Catalog(names, names, "title", paths, TokenTrie.from_paths(paths))
    draw = np.random.default_rng(3)
    seen = TokenRows.from_lists([draw.integers(0, ITEMS, size=1 + row % 3).tolist() for row in range(ROWS)])
    prompts = TokenRows.from_lists([[row % VOCAB, (row * row) % VOCAB, row % 5][: 1 + row % 3] for row in range(ROWS)])
    none = np.zeros(ROWS, dtype=np.int64)
    engine = RolloutEngine(TableLM(VOCAB, seed=2, impossible=False), catalog, RolloutConfig(), seed=0)
    return engine, Samples(prompts, none, none, seen), seen


def lists(allowed: Allowed, *, n: int, min_score: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Lists of all rows, in the order of the rows."""
    engine, samples, seen = scene()
    item_NK, score_NK = np.full((ROWS, n), NO_ITEM), np.full((ROWS, n), -np.inf)
    for chunk in list_chunks(samples, engine, allowed):
        found = search_lists(
            engine, samples, chunk, n=n, width=engine.catalog.trie.num_leaves, token_budget=1 << 12,
            min_score=min_score, allowed=allowed, seen=seen,
        )  # fmt: skip
        item_NK[chunk], score_NK[chunk] = found.item_NK, found.score_NK
    return item_NK, score_NK


def test_without_filters_lists_are_those_of_the_engine():
    engine, samples, _ = scene()
    found = engine.search(samples.prompts, engine.catalog.trie.num_leaves)
    item_NK, score_NK = lists(Allowed(engine.catalog), n=4)
    assert np.array_equal(item_NK, found.items_BW[:, :4].numpy())
    assert np.array_equal(score_NK, found.scores_BW[:, :4].numpy())


@settings(max_examples=30)
@given(st.sets(st.integers(0, ITEMS - 1), min_size=1), st.booleans())
def test_filtered_lists_are_the_full_ranking_without_what_is_forbidden(kept: set[int], unseen: bool):
    engine, samples, seen = scene()
    full = engine.search(samples.prompts, engine.catalog.trie.num_leaves)
    allowed_I = np.isin(np.arange(ITEMS), list(kept))
    item_NK, score_NK = lists(Allowed(engine.catalog, allowed_I, unseen=unseen), n=6)
    for row in range(ROWS):
        open_items = kept - set(seen[row].tolist()) if unseen else kept
        expected = [
            (min(set(engine.catalog.trie.items(leaf).tolist()) & open_items), score)
            for leaf, score in zip(full.leaf_BW[row].tolist(), full.scores_BW[row].tolist(), strict=True)
            if set(engine.catalog.trie.items(leaf).tolist()) & open_items
        ][:6]
        listed = item_NK[row] != NO_ITEM
        assert list(zip(item_NK[row][listed].tolist(), score_NK[row][listed].tolist(), strict=True)) == expected


def test_long_filters_are_searched_for_fewer_rows_at_once(monkeypatch: pytest.MonkeyPatch):
    engine, samples, _ = scene()
    half = Allowed(engine.catalog, np.arange(ITEMS) < 3, unseen=True)
    expected = lists(half, n=3)
    monkeypatch.setattr("tawin_nemo.eval.top_lists.MOST_LISTED", 15)
    assert [len(chunk) for chunk in list_chunks(samples, engine, half)] == [5, 5, 2]
    assert all(np.array_equal(one, other) for one, other in zip(lists(half, n=3), expected, strict=True))


def test_entries_below_the_least_score_are_dropped():
    engine, _, _ = scene()
    whole, score_NK = lists(Allowed(engine.catalog), n=5)
    least = float(np.median(score_NK))
    item_NK, _ = lists(Allowed(engine.catalog), n=5, min_score=least)
    assert np.array_equal(item_NK, np.where(score_NK >= least, whole, NO_ITEM))
    assert 0 < (item_NK == NO_ITEM).sum() < item_NK.size


def test_a_filter_lists_the_fewer_items_and_prompts_share_it():
    engine, _, seen = scene()
    trie = engine.catalog.trie
    assert shorter_filter(trie, np.arange(ITEMS) < 2).kind == "only"
    assert shorter_filter(trie, np.arange(ITEMS) > 1).kind == "except"
    filters = Allowed(engine.catalog, np.arange(ITEMS) < 2).filters(seen)
    assert filters is not None
    other = ItemFilter.only(trie, [3])
    kept, used_B, new_B = rejoined(None, torch.zeros(0, dtype=torch.long), [filters[0], None, other, *filters[1:]])
    assert [len(kept), used_B.tolist()] == [2, []]
    assert new_B.tolist() == [0, -1, 1, *[0] * (ROWS - 1)]
