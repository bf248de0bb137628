from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tawin_nemo.data.interactions import Split
from tawin_nemo.data_prep.dataset import leak_check
from tawin_nemo.data_prep.pipeline import sliding_windows
from tawin_nemo.data_prep.splits import split_by_time
from tawin_nemo.types import SPLITS, TokenRows
from tawin_nemo.util.errors import DataError

ITEMS, HISTORY = 12, 4


@pytest.fixture
def splits() -> dict[str, Split]:
    generator = np.random.default_rng(0)
    user, item, time = (generator.integers(high, size=200) for high in (9, ITEMS, 1000))
    return dict(zip(SPLITS, split_by_time(sliding_windows(user, item, time, HISTORY)), strict=True))


def with_history(split: Split, row: int, items: list[int]) -> Split:
    rows = [split.history[place] for place in range(len(split))]
    rows[row] = np.array(items, dtype=np.int64)
    return replace(split, history=TokenRows.from_lists(rows))


def test_clean_data_pass(splits: dict[str, Split]) -> None:
    report = leak_check(splits, ITEMS, HISTORY)
    assert report.broken_windows == 0
    assert report.rows == 200 - 9
    assert report.borders["train"][1] <= report.borders["valid"][0]


def test_exchanged_splits(splits: dict[str, Split]) -> None:
    with pytest.raises(DataError, match=r"leak: valid ends at time \d+, later than test begins"):
        leak_check(splits | {"valid": splits["test"], "test": splits["valid"]}, ITEMS, HISTORY)


def test_shuffled_time(splits: dict[str, Split]) -> None:
    time = splits["train"].time_N.copy()
    time[3] = time[-1] + 1
    with pytest.raises(DataError, match="leak: train row 4 is earlier"):
        leak_check(splits | {"train": replace(splits["train"], time_N=time)}, ITEMS, HISTORY)


def test_target_in_its_own_history(splits: dict[str, Split]) -> None:
    """The window is one item too far to the right: it ends with the target itself."""
    test = splits["test"]
    row = next(row for row in range(len(test)) if test.history[row][-1] != test.target_N[row])
    shifted = [*test.history[row][1:].tolist(), int(test.target_N[row])]
    assert leak_check(splits | {"test": with_history(test, row, shifted)}, ITEMS, HISTORY).broken_windows >= 1


def test_gap_in_a_history(splits: dict[str, Split]) -> None:
    train = splits["train"]
    row = next(row for row in range(len(train)) if len(train.history[row]) == 2)
    assert leak_check(splits | {"train": with_history(train, row, [5])}, ITEMS, HISTORY).broken_windows >= 1


@pytest.mark.parametrize(
    ("items", "message"),
    [([ITEMS], "names item 12"), ([-1], "names item -1"), ([1] * (HISTORY + 1), "history of 5 items, expected 1..4")],
)
def test_bad_history(splits: dict[str, Split], items: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        leak_check(splits | {"train": with_history(splits["train"], 7, items)}, ITEMS, HISTORY)


def test_empty_split(splits: dict[str, Split]) -> None:
    with pytest.raises(DataError, match="split valid has no rows"):
        leak_check(splits | {"valid": splits["valid"].slice(0, 0)}, ITEMS, HISTORY)


def test_a_users_first_history_has_one_item() -> None:
    """A longer one means that earlier samples of the user are missing from the splits."""

    def single(user: int, history: list[int]) -> Split:
        return Split(np.array([user]), TokenRows.from_lists([history]), np.array([0]), np.array([user]))

    splits = {"train": single(0, [1]), "valid": single(1, [2]), "test": single(2, [3])}
    assert leak_check(splits, ITEMS, HISTORY).broken_windows == 0
    assert leak_check(splits | {"valid": single(1, [2, 3])}, ITEMS, HISTORY).broken_windows == 1
