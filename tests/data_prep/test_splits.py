"""Leave-one-out, date splits, and the order of interactions at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import Dataset, load_dataset
from tawin_nemo.data_prep.pipeline import sliding_windows
from tawin_nemo.data_prep.prepare import prepare
from tawin_nemo.data_prep.splits import leave_one_out, split_by_dates
from tawin_nemo.data_prep.ties import tie_statistics
from tawin_nemo.util.errors import ConfigError, DataError
from tests.data_prep.formats import ITEMS, START, USERS, log, table

DAY = 86_400


def run(root: Path, seed: int = 0, **options: Any) -> Dataset:
    data = DataConfig(max_history=4)
    return load_dataset(prepare("table", root, root / "out", prepare=PrepareConfig(**options), data=data, seed=seed))


def write(root: Path) -> None:
    table(root / "log.csv", "user,item,time", ((row.u, row.i, row.time) for row in log()))


def same_day(root: Path, users: int = 60, items: int = 12, days: int = 3) -> None:
    """Each user takes all items on few days; the file lists a day by item id, as Amazon's files do."""
    rng = np.random.default_rng(0)
    lines = []
    for user in range(users):
        day_I = rng.integers(days, size=items)
        lines += [(f"u{user:03d}", f"i{item:03d}", START + DAY * int(day_I[item])) for item in range(items)]
    table(root / "log.csv", "user,item,time", lines)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=40))
def test_leave_one_out_takes_each_users_last_two(interactions: list[tuple[int, int, int]]) -> None:
    user, item, time = (np.array(column) for column in zip(*interactions, strict=True))
    samples = sliding_windows(user, item, time, 5)
    train, valid, test = leave_one_out(samples)
    assert len(train) + len(valid) + len(test) == len(samples)
    for one in np.unique(samples.user_N):
        own = samples.target_N[samples.user_N == one].tolist()
        parts = [part.target_N[part.user_N == one].tolist() for part in (train, valid, test)]
        assert parts == ([own, [], []] if len(own) == 1 else [own[:-2], own[-2:-1], own[-1:]])
    for part in (train, valid, test):
        assert (np.diff(part.time_N) >= 0).all()


def test_leave_one_out_of_a_log(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = run(tmp_path, split="leave_one_out")
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (USERS * (ITEMS - 3), USERS, USERS)
    last = {row.user: row.item for row in log()}  # the log is in order of time per user
    assert dict(zip(dataset.test.user_N.tolist(), dataset.test.target_N.tolist(), strict=True)) == last
    assert dataset.manifest["leak_check"]["broken_windows"] == 0
    assert dataset.manifest["statistics"]["late_train_rows"] == 0
    statistics = (tmp_path / "out" / "statistics.md").read_text()
    assert "| train rows not earlier than the first of test | 0 |" in statistics


def test_train_rows_later_than_test_are_counted(tmp_path: Path) -> None:
    lines = [(row.u, row.i, row.time + 1_000 * DAY * (row.user % 2)) for row in log()]
    table(tmp_path / "log.csv", "user,item,time", lines)
    dataset = run(tmp_path, split="leave_one_out")
    assert dataset.manifest["statistics"]["late_train_rows"] == USERS // 2 * (ITEMS - 3)


def test_split_by_dates(tmp_path: Path) -> None:
    lines = [(row.u, row.i, START + DAY * ((row.time - START) // (12 * 3600))) for row in log()]  # six days
    table(tmp_path / "log.csv", "user,item,time", lines)
    dataset = run(tmp_path, split="date", valid_start="2021-03-05", test_start="2021-03-06")
    assert dataset.train.time_N.max() == START + 3 * DAY
    assert set(dataset.valid.time_N.tolist()) == {START + 4 * DAY}
    assert set(dataset.test.time_N.tolist()) == {START + 5 * DAY}
    with pytest.raises(DataError, match=r"leaves a split empty \(train \d+, valid \d+, test 0\): move prepare"):
        run(tmp_path, split="date", valid_start="2021-03-05", test_start="2021-06")
    samples = sliding_windows(np.zeros(4, int), np.arange(4), np.array([START, START + 1, START + DAY, START + DAY]), 3)
    assert [len(part) for part in split_by_dates(samples, "2021-03-01", "2021-03-02")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["split=date"], r"prepare\.split=date begins .* set both"),
        (["split=date", "valid_start=2021-01", "test_start=2020-12"], "test must begin after valid"),
        (["valid_start=2021-01"], r"belong to prepare\.split=date, not ratio"),
        (["split=date", "valid_start=soon", "test_start=2021-01"], r"prepare\.valid_start=.?soon.? is not a date"),
        (["split=random"], "ratio, leave_one_out"),
    ],
)
def test_splits_that_make_no_sense_are_refused_at_load(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, [f"prepare.{word}" for word in words])


def test_ties_are_counted_and_their_order_is_a_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In file order the later of two tied targets has the larger id always; at random half of the time."""
    same_day(tmp_path)
    ties = {}
    for order in ("file", "random", "item"):
        dataset = run(tmp_path, ties=order)
        ties[order] = dataset.manifest["statistics"]["ties"]
    assert ties["file"] == ties["item"]
    assert ties["file"]["larger_id_share"] == 1.0
    assert 0.4 < ties["random"]["larger_id_share"] < 0.6
    assert ties["random"]["tied"] == ties["file"]["tied"] > 400
    assert ties["file"]["neighbours"] == 60 * 11
    assert "100% of them go to the larger item id, where chance gives 50 %: a model can learn that order" in caplog.text
    assert run(tmp_path).manifest["statistics"]["ties"] == ties["file"]  # the default keeps the file's order
    text = (tmp_path / "out" / "statistics.md").read_text()
    assert "| of these with the larger item id second (chance: 50 %) | 100.0% |" in text


def test_random_ties_follow_the_seed_and_keep_the_order_of_time(tmp_path: Path) -> None:
    same_day(tmp_path)
    one, again, other = (run(tmp_path, seed, ties="random").train for seed in (1, 1, 2))
    assert one.target_N.tolist() == again.target_N.tolist() != other.target_N.tolist()
    assert np.array_equal(one.time_N, other.time_N)


def test_item_order_sorts_what_the_file_does_not(tmp_path: Path) -> None:
    lines = [(f"u{user}", f"i{(item * 5) % 6}", START) for user in range(6) for item in range(6)]
    table(tmp_path / "log.csv", "user,item,time", lines)
    assert run(tmp_path, ties="item").train.target_N[:5].tolist() == [1, 2, 3, 4, 5]
    assert run(tmp_path).train.target_N[:5].tolist() == [5, 4, 3, 2, 1]


def test_tie_statistics_by_hand() -> None:
    user, item, time = np.array([0, 0, 0, 0, 1, 1]), np.array([3, 5, 5, 1, 2, 9]), np.array([7, 7, 7, 7, 7, 8])
    assert tie_statistics(user, item, time) == {"neighbours": 4, "tied": 3, "larger_id_share": 0.5}
    assert tie_statistics(user[:1], item[:1], time[:1])["larger_id_share"] is None
