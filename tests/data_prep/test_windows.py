from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tawin_nemo.data_prep.pipeline import sliding_windows
from tawin_nemo.data_prep.splits import split_by_time

#: (user, item, time)
logs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 6)), max_size=50)
Row = tuple[int, list[int], int, int]


def slow_windows(log: list[tuple[int, int, int]], max_history: int) -> list[Row]:
    rows: list[tuple[int, int, int, list[int], int]] = []
    for user in sorted({user for user, _, _ in log}):
        own = sorted((entry for entry in log if entry[0] == user), key=lambda entry: entry[2])
        for place in range(1, len(own)):
            history = [item for _, item, _ in own[:place]][-max_history:]
            rows.append((own[place][2], user, place, history, own[place][1]))
    return [(user, history, target, time) for time, user, _, history, target in sorted(rows)]


def run(log: list[tuple[int, int, int]], max_history: int) -> list[Row]:
    user_N, item_N, time_N = np.array(log, dtype=np.int64).reshape(-1, 3).T
    samples = sliding_windows(user_N, item_N, time_N, max_history)
    columns = samples.user_N.tolist(), samples.target_N.tolist(), samples.time_N.tolist()
    return [
        (user, samples.history[row].tolist(), target, time)
        for row, (user, target, time) in enumerate(zip(*columns, strict=True))
    ]


@given(logs, st.integers(1, 4))
def test_equals_the_loop(log: list[tuple[int, int, int]], max_history: int) -> None:
    assert run(log, max_history) == slow_windows(log, max_history)


def test_ties_keep_the_order_of_the_file() -> None:
    log = [(0, 5, 100), (0, 3, 100), (0, 4, 100)]
    assert run(log, 10) == [(0, [5], 3, 100), (0, [5, 3], 4, 100)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (45_324, (36_259, 4_532, 4_533)),  # Industrial, Office and Yelp of the paper's Table 4
        (48_656, (38_924, 4_866, 4_866)),
        (96_372, (77_097, 9_637, 9_638)),
        (10, (8, 1, 1)),
    ],
)
def test_split_sizes_of_the_paper(rows: int, expected: tuple[int, int, int]) -> None:
    count = rows + 1  # one user, the first interaction is no target
    zeros = np.zeros(count, dtype=np.int64)
    splits = split_by_time(sliding_windows(zeros, zeros, np.arange(count), 1))
    assert tuple(len(split) for split in splits) == expected
    assert np.concatenate([split.time_N for split in splits]).tolist() == list(range(1, count))
