"""Popularity bias, coverage and diversity: by hand, and against plain loops on random lists."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.bias import (
    beyond_accuracy,
    coverage,
    first_codes,
    log_popularity,
    popularity_bias,
    sequence_counts,
    target_counts,
)
from tawin_nemo.types import TokenRows

EOS = 1
#: Items 2 and 4 are written alike. All paths begin with 3, which distinguishes nothing.
PATHS = [[3, 5, 6, EOS], [3, 5, 7, EOS], [3, 8, EOS], [3, 9, 9, 9, EOS], [3, 8, EOS], [3, 4, EOS]]
COUNTS = np.array([10, 4, 6, 1, 0, 2])


def catalog_of(paths: list[list[int]]) -> Catalog:
    rows = TokenRows.from_lists(paths)
    names = [f"item {i}" for i in range(len(paths))]
    return Catalog(names, names, "sid", rows, TokenTrie.from_paths(rows))


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return catalog_of(PATHS)


def leaves(catalog: Catalog, lists: list[list[int]]) -> np.ndarray:
    """-1 for NO_ITEM; lists of one length."""
    items = np.array(lists)
    return np.where(items >= 0, catalog.leaf_I[np.maximum(items, 0)], -1)


def test_popularity_bias_by_hand(catalog: Catalog) -> None:
    history = TokenRows.from_lists([[0, 1], [3], [4, 2, 2]])
    found = popularity_bias(leaves(catalog, [[0, 5], [1, -1], [2, 3]]), catalog, history, COUNTS)
    ln = math.log1p
    assert found.tolist() == pytest.approx(
        [
            (ln(10) + ln(2)) / 2 - (ln(10) + ln(4)) / 2,
            ln(4) - ln(1),  # a list of one
            ((ln(6) + 0) / 2 + ln(1)) / 2 - (0 + ln(6) + ln(6)) / 3,  # the path of items 2 and 4 has their mean
        ]
    )


def test_recommending_the_history_is_not_biased(catalog: Catalog) -> None:
    history = TokenRows.from_lists([[0, 1], [5, 3]])
    lists = leaves(catalog, [[1, 0], [3, 5]])
    assert popularity_bias(lists, catalog, history, COUNTS).tolist() == pytest.approx([0, 0])
    popular = popularity_bias(leaves(catalog, [[0, 0], [0, 0]]), catalog, history, COUNTS)
    rare = popularity_bias(leaves(catalog, [[3, 3], [3, 3]]), catalog, history, COUNTS)
    assert (popular > 0).all()
    assert (rare < 0).all()


def test_coverage_counts_all_items_of_a_listed_path(catalog: Catalog) -> None:
    assert coverage(leaves(catalog, [[0, 1], [0, -1]]), catalog) == 2 / 6
    assert coverage(leaves(catalog, [[4, -1]]), catalog) == 2 / 6  # items 2 and 4
    assert coverage(leaves(catalog, [[-1, -1]]), catalog) == 0
    assert coverage(leaves(catalog, [[0, 1, 2, 3, 5]]), catalog) == 1


def test_first_codes_skip_what_all_paths_share(catalog: Catalog) -> None:
    lists = leaves(catalog, [[0, 1, 2], [3, 5, 2], [0, -1, -1], [-1, -1, -1]])
    assert first_codes(lists, catalog).tolist() == [2, 3, 1, 0]
    one = catalog_of([[3, 4, EOS], [3, 4, EOS]])
    assert first_codes(one.leaf_I[None, :1], one).tolist() == [1]


def test_log_popularity_is_that_of_the_paper() -> None:
    assert log_popularity(np.array([0, 1, 3])).tolist() == pytest.approx([0, math.log(2), math.log(4)])


def test_popularity_counts_whole_sequences() -> None:
    history = TokenRows.from_lists([[1], [1, 2], [0]])
    samples = Samples(TokenRows.from_lists([[7]] * 3), np.array([2, 3, 2]), np.zeros(3, np.int64), history)
    assert target_counts(samples, 5).tolist() == [0, 0, 2, 1, 0]
    assert sequence_counts(samples, 5).tolist() == [1, 2, 3, 1, 0]


def test_random_lists_against_loops() -> None:
    rng = np.random.default_rng(0)
    catalog = catalog_of([[int(x) for x in rng.integers(2, 6, rng.integers(1, 4))] + [EOS] for _ in range(40)])
    counts = rng.integers(0, 9, 40)
    items = [[int(x) for x in rng.integers(-1, 40, 12)] for _ in range(30)]
    history = TokenRows.from_lists([rng.integers(0, 40, rng.integers(1, 6)).tolist() for _ in range(30)])
    lists = leaves(catalog, items)
    found = beyond_accuracy(lists, catalog, history, [1, 4, 12], counts)
    group = {i: [j for j in range(40) if catalog.leaf_I[j] == catalog.leaf_I[i]] for i in range(40)}

    def logpop(item: int) -> float:
        return math.log(1 + counts[item])

    for k in (1, 4, 12):
        biases, covered = [], set()
        for row, listed in enumerate(items):
            top = [item for item in listed[:k] if item >= 0]
            covered |= {other for item in top for other in group[item]}
            if top:
                of_list = np.mean([np.mean([logpop(other) for other in group[item]]) for item in top])
                biases.append(of_list - np.mean([logpop(int(item)) for item in history[row]]))
        assert found[f"coverage@{k}"] == pytest.approx(len(covered) / 40)
        assert found[f"popularity_bias@{k}"] == pytest.approx(np.mean(biases))
    codes = [len({int(catalog.paths[item][0]) for item in listed[:10] if item >= 0}) for listed in items]
    assert found["first_codes@10"] == pytest.approx(np.mean(codes))
    assert set(found) == {f"{name}@{k}" for name in ("coverage", "popularity_bias") for k in (1, 4, 12)} | {
        "first_codes@10"
    }


def test_what_is_not_known_is_left_out(catalog: Catalog) -> None:
    history = TokenRows.from_lists([[0], [1]])
    lists = leaves(catalog, [[0, 1], [2, 3]])
    assert set(beyond_accuracy(lists, catalog, history, [2])) == {"coverage@2", "first_codes@10"}
    nothing = beyond_accuracy(leaves(catalog, [[-1], [-1]]), catalog, history, [1], COUNTS)
    assert nothing == {"coverage@1": 0.0, "first_codes@10": 0.0}
