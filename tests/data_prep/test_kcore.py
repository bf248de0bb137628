from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tawin_nemo.data_prep.pipeline import k_core

pairs = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60)


def slow_k_core(interactions: list[tuple[int, int]], k: int) -> list[bool]:
    """Remove one offending interaction at a time."""
    alive = [True] * len(interactions)
    while True:
        users = Counter(user for (user, _), kept in zip(interactions, alive, strict=True) if kept)
        items = Counter(item for (_, item), kept in zip(interactions, alive, strict=True) if kept)
        for place, (user, item) in enumerate(interactions):
            if alive[place] and (users[user] < k or items[item] < k):
                alive[place] = False
                break
        else:
            return alive


def run(interactions: list[tuple[int, int]], k: int) -> list[bool]:
    users = np.array([user for user, _ in interactions], dtype=np.int64)
    items = np.array([item for _, item in interactions], dtype=np.int64)
    return k_core(users, items, k).tolist()


@given(pairs, st.integers(1, 5))
def test_equals_one_at_a_time_removal(interactions: list[tuple[int, int]], k: int) -> None:
    assert run(interactions, k) == slow_k_core(interactions, k)


def test_needs_several_rounds() -> None:
    """A 2-core of a triangle of pairs with a tail: each round uncovers the next end of the tail."""
    square = [(0, 0), (0, 1), (1, 0), (1, 1)]
    tail = [(1, 2), (2, 2), (2, 3), (3, 3)]
    assert run(square + tail, 2) == [True] * 4 + [False] * 4


def test_no_interactions() -> None:
    assert run([], 5) == []
