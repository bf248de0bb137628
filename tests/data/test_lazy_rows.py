"""Lazy rows against the same rows in memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.data.lazy_rows import JoinedRows, NewestEntries, TokenSource
from tawin_nemo.types import TokenRows

LISTS = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6)


def assert_same(lazy: TokenSource, expected: list[list[int]], picks: list[int]) -> None:
    rows = np.array([pick % len(expected) for pick in picks] if expected else [], dtype=np.int64)
    assert len(lazy) == len(expected)
    assert [lazy[row].tolist() for row in range(len(lazy))] == expected
    assert lazy.lengths.tolist() == lazy.in_memory().lengths.tolist() == [*map(len, expected)]
    assert (lazy.longest, lazy.num_tokens) == (max(map(len, expected), default=0), sum(map(len, expected)))
    taken, wanted = lazy.take(rows), [expected[row] for row in rows]
    assert [taken[row].tolist() for row in range(len(taken))] == wanted
    assert taken.flat.dtype == taken.offsets.dtype == lazy.lengths_of(rows).dtype == np.int64
    assert lazy.lengths_of(rows).tolist() == [*map(len, wanted)]
    part = lazy.select(rows)
    assert [part[row].tolist() for row in range(len(part))] == wanted
    again = np.arange(len(rows))[::-2]
    assert [row.tolist() for row in map(part.select(again).__getitem__, range(len(again)))] == wanted[::-2]


@settings(max_examples=60)
@given(LISTS, st.lists(st.integers(0, 9), max_size=6), st.lists(st.integers(0, 99), max_size=8))
def test_newest_entries(lists, kept, picks) -> None:
    kept_N = np.array([min(len(row), (kept or [2])[i % len(kept or [2])]) for i, row in enumerate(lists)], np.int32)
    whole = TokenRows.from_lists(lists)
    small = TokenRows(whole.flat.astype(np.int32), whole.offsets)
    expected = [row[len(row) - count :] for row, count in zip(lists, kept_N.tolist(), strict=True)]
    assert_same(NewestEntries(small, kept_N), expected, picks)


@settings(max_examples=60)
@given(st.lists(LISTS, min_size=1, max_size=4), st.lists(st.integers(0, 99), max_size=8))
def test_joined_rows(parts, picks) -> None:
    sources = [TokenRows.from_lists(part) for part in parts]
    sources[0:1] = [NewestEntries(sources[0], sources[0].lengths)]
    assert_same(JoinedRows.of(sources), [row for part in parts for row in part], picks)


def test_a_single_part_is_not_wrapped() -> None:
    rows = TokenRows.from_lists([[1]])
    assert JoinedRows.of([rows]) is rows
