"""Lists of other programs: the formats they come in, metrics by hand, and files that do not fit the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from tawin_nemo.config.schema import EvalConfig
from tawin_nemo.data.interactions import Dataset, ItemFrame, Split
from tawin_nemo.eval.foreign_lists import UNKNOWN, measure, one_path_each, read_lists
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError

ITEMS = ["a", "b", "7", "8"]
#: Targets b, 7, 8 of the users x, y, z.
LISTS = {"x": ["b", "a"], "y": ["a", "nowhere", "7"], "z": ["7"]}


def split(users: list[int]) -> Split:
    rows = len(users)
    history = TokenRows.from_lists([[0]] * rows)
    return Split(np.array(users), history, np.array([1, 2, 3])[:rows], np.arange(rows))


def dataset(users: list[int] | None = None) -> Dataset:
    test = split(users or [4, 5, 6])
    names = pa.table({"user": [4, 5, 6, 7], "external_id": ["x", "y", "z", "w"]})
    return Dataset(ItemFrame(ITEMS, ITEMS, [""] * 4), split([4]), split([4]), test, {}, names)


def write(path: Path, table: pl.DataFrame) -> Path:
    writers: dict[str, Any] = {
        ".parquet": table.write_parquet, ".csv": table.write_csv, ".jsonl": table.write_ndjson,
        ".tsv": lambda file: table.write_csv(file, separator="\t"),
    }  # fmt: skip
    writers[path.suffix](path)
    return path


def by_item(**more: Any) -> pl.DataFrame:
    """One line per item, worst first, with ranks that count from 1."""
    lines = [
        {"user_id": user, "item_id": item, "rank": place + 1}
        for user, items in LISTS.items()
        for place, item in enumerate(items)
    ]
    return pl.DataFrame(lines[::-1]).with_columns(**more)


def expected() -> list[list[int]]:
    return [[1, 0, -1], [0, UNKNOWN, 2], [2, -1, -1]]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_lines_of_single_items(tmp_path: Path, suffix: str) -> None:
    data = dataset()
    lists = read_lists(write(tmp_path / f"lists{suffix}", by_item()), data.test, data)
    assert lists.item_BK.tolist() == expected()
    assert (lists.unknown, lists.without_list, lists.unused) == (1, 0, 0)


def test_scores_order_a_list_and_equal_ones_keep_the_order_of_the_file(tmp_path: Path) -> None:
    data = dataset()
    table = pl.DataFrame({"row": [0, 0, 0, 2], "item_id": ["a", "8", "b", "a"], "score": [0.5, 0.5, 2.0, -1.0]})
    lists = read_lists(write(tmp_path / "lists.csv", table), data.test, data)
    assert lists.item_BK.tolist() == [[1, 0, 3], [-1, -1, -1], [0, -1, -1]]
    assert lists.without_list == 1


@pytest.mark.parametrize("key", [None, "row", "user_id"])
def test_lines_of_whole_lists(tmp_path: Path, key: str | None) -> None:
    data = dataset()
    table = pl.DataFrame({"user_id": list(LISTS), "row": [0, 1, 2], "item_ids": list(LISTS.values())})
    table = table.select(*([key] if key else []), "item_ids")
    for suffix in (".parquet", ".jsonl"):
        assert read_lists(write(tmp_path / f"l{suffix}", table), data.test, data).item_BK.tolist() == expected()


def test_numbers_as_ids_and_users_without_a_row(tmp_path: Path) -> None:
    data = dataset()
    table = pl.DataFrame({"user_id": ["x", "x", "w"], "item_id": [7, 8, 8], "rank": [0, 1, 0]})
    lists = read_lists(write(tmp_path / "lists.parquet", table), data.test, data)
    assert lists.item_BK.tolist() == [[2, 3], [-1, -1], [-1, -1]]
    assert (lists.unused, lists.without_list) == (1, 2)


def test_metrics_by_hand(tmp_path: Path) -> None:
    data = dataset()
    lists = read_lists(write(tmp_path / "lists.csv", by_item()), data.test, data)
    result = measure(lists, data, data.test, EvalConfig(ks=[1, 3]))
    assert result.per_user["rank"].to_list() == [0, 2, -1]
    assert result.means == pytest.approx({"recall@1": 1 / 3, "recall@3": 2 / 3, "ndcg@1": 1 / 3, "ndcg@3": 1.5 / 3})
    assert result.invalid_rate == pytest.approx(1 / 6)
    assert result.beyond["coverage@1"] == 3 / 4
    assert result.beyond["coverage@3"] == 3 / 4
    assert result.short_rows == pytest.approx(2 / 3)
    # train is one row, item 0 then item 1: ln(2) for both, 0 for the others; unknown entries are left out
    ln2 = np.log(2)
    assert result.beyond["popularity_bias@3"] == pytest.approx(np.mean([ln2, ln2 / 2, 0]) - ln2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (by_item().drop("item_id"), "no column 'item_id' or 'item_ids'; it has user_id, rank"),
        (by_item().drop("rank"), "no column 'rank' or 'score'"),
        (by_item().drop("user_id"), "no column 'row' or 'user_id'"),
        (by_item(item_id=pl.lit("a")), "the list of row 1 has item a more than once"),
        (by_item(rank=pl.lit(3)), "has rank 3.0 more than once"),
        (by_item(rank=pl.lit("first")), "column rank holds 'first'"),
        (by_item(rank=pl.lit(float("inf"))), "column rank holds inf"),
        (by_item(item_id=pl.lit(2.5)), "column item_id holds Float64"),
        (by_item(item_id=pl.lit(None, pl.String)), "6 lines have no item_id"),
        (by_item(row=pl.lit(3)), "row 3 is no row of the split, which has 0 .. 2"),
        (by_item(user_id=pl.lit("nobody")), "none of its users has a row"),
        (by_item().clear(), "holds no lists"),
        (pl.DataFrame({"item_ids": [["a"]]}), "1 lists for 3 rows and no column row or user_id"),
        (pl.DataFrame({"row": [1, 1], "item_ids": [["a"], ["b"]]}), "2 lists for row 1"),
        (pl.DataFrame({"row": [1], "item_ids": ["a b"]}), "column item_ids holds String instead of lists"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, table: pl.DataFrame, message: str) -> None:
    data = dataset()
    path = write(tmp_path / "lists.parquet", table)
    with pytest.raises(DataError) as raised:
        read_lists(path, data.test, data)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_user_with_several_rows_is_ambiguous(tmp_path: Path) -> None:
    data = dataset([4, 5, 5])
    path = write(tmp_path / "lists.csv", by_item())
    with pytest.raises(DataError, match=r"user y has 2 rows in the split.*give each list its row"):
        read_lists(path, data.test, data)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    data = dataset()
    for name, content in (("lists.txt", b"a"), ("lists.parquet", b"no parquet"), ("lists.jsonl", b"{")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_lists(tmp_path / name, data.test, data)


def test_every_item_has_a_path_of_its_own() -> None:
    catalog = one_path_each(5)
    assert len(np.unique(catalog.leaf_I)) == 5
    assert catalog.sharing_I.tolist() == [1] * 5
