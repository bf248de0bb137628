"""Freshness and drift: figures of tables made by hand, and the divergence against scipy's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy.spatial.distance import jensenshannon

from tawin_nemo.data.interactions import Dataset, ItemFrame, Split
from tawin_nemo.tools.retrain.freshness import INTERACTIONS, divergence, figures, popularity, write_popularity
from tawin_nemo.types import EXTERNAL_ID, USER, TokenRows

MIDNIGHT = 1_514_764_800  # 2018-01-01T00:00:00Z


def table(**counts: int) -> pl.DataFrame:
    return pl.DataFrame({EXTERNAL_ID: list(counts), INTERACTIONS: list(counts.values())})


def split(targets: list[int], time: int) -> Split:
    rows = len(targets)
    history = TokenRows.from_lists([[0]] * rows)
    return Split(np.zeros(rows, dtype=np.int64), history, np.array(targets), np.full(rows, time))


def dataset(names: str, train: list[int], valid: list[int], *, time: int = MIDNIGHT, users: str = "") -> Dataset:
    items = ItemFrame(list(names), list(names), [""] * len(names))
    table = pa.table({USER: list(range(len(users))), EXTERNAL_ID: list(users)}) if users else None
    return Dataset(items, split(train, time), split(valid, time + 43_200), split(valid, time), {}, table)


def test_the_divergence_is_scipys_squared_distance():
    draw = np.random.default_rng(1)
    for _ in range(20):
        p_I, q_I = draw.integers(0, 9, 12), draw.integers(0, 9, 12)
        names = [f"i{item}" for item in range(12)]
        ours = pl.DataFrame({EXTERNAL_ID: names, INTERACTIONS: p_I})
        theirs = pl.DataFrame({EXTERNAL_ID: names, INTERACTIONS: q_I}).sample(fraction=1, shuffle=True, seed=1)
        assert divergence(ours, theirs) == pytest.approx(jensenshannon(p_I, q_I, base=2) ** 2, abs=1e-12)


def test_equal_tables_have_none_and_disjoint_ones_have_all():
    assert divergence(table(a=2, b=4), table(b=2, a=1)) == 0.0
    assert divergence(table(a=3), table(b=5)) == 1.0
    assert divergence(table(a=3), table(a=0)) == 1.0


def test_figures_of_a_first_version_and_of_a_later_one(tmp_path: Path):
    first = dataset("abc", [0, 0, 1, 2], [1], users="uv")
    alone = figures(first, "2018-01-03", before=None, data_before=None)
    assert (alone.newest_interaction, alone.age_days) == ("2018-01-01T12:00:00+00:00", 2.5)
    assert (alone.items, alone.new_items, alone.popularity_drift, alone.new_users) == (3, None, None, None)
    assert alone.valid_drift == divergence(popularity(first), popularity(first, "valid")) > 0

    write_popularity(tmp_path / "popularity.parquet", first)
    first.users.select([USER, EXTERNAL_ID])
    pl.DataFrame({USER: [0, 1], EXTERNAL_ID: ["u", "v"]}).write_parquet(tmp_path / "users.parquet")
    later = figures(
        dataset("bcde", [0, 0, 1, 2], [1], users="vwxy"), "2018-01-03", before=tmp_path / "popularity.parquet",
        data_before=tmp_path,
    )  # fmt: skip
    assert (later.new_items, later.gone_items, later.new_users) == (0.5, pytest.approx(1 / 3), 0.75)
    assert later.popularity_drift == divergence(table(a=2, b=1, c=1), table(b=2, c=1, d=1, e=0))


def test_data_without_times_or_users_have_no_such_figures():
    found = figures(dataset("ab", [0, 1], [1], time=100), "2018-01-01", before=None, data_before=None)
    assert (found.newest_interaction, found.age_days, found.users, found.new_users) == (None, None, None, None)
