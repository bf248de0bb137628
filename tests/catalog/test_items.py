"""The catalog's facts about items that share a token path."""

from __future__ import annotations

import pytest

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError

EOS = 0
PATHS = TokenRows.from_lists([[5, EOS], [7, 8, EOS], [5, EOS], [7, 8, EOS], [9, EOS], [5, EOS]])


def catalog(titles: int = 6) -> Catalog:
    names = [f"title {item}" for item in range(titles)]
    return Catalog(names, names, "title", PATHS, TokenTrie.from_paths(PATHS))


def test_items_written_alike_share_leaf_and_count() -> None:
    leaf_I = catalog().leaf_I
    assert leaf_I[0] == leaf_I[2] == leaf_I[5]
    assert leaf_I[1] == leaf_I[3]
    assert len(set(leaf_I.tolist())) == 3
    assert catalog().sharing_I.tolist() == [3, 2, 3, 2, 1, 3]
    assert catalog().duplicates() == [(0, 2, 5), (1, 3)]


def test_summary_counts() -> None:
    # 2 + 3 + 2 + 3 + 2 + 2 = 14 tokens on 6 paths; only the root has a choice: 5, 7 or 9
    assert catalog().summary() == (
        "6 items (title), 3 distinct token paths, 5 items share theirs, 2.3 tokens per path (max 3), "
        "1 trie nodes with a choice"
    )


def test_parts_of_different_size_are_refused() -> None:
    with pytest.raises(CatalogError, match="'titles': 5"):
        catalog(titles=5)
