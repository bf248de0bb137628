"""Histories in Parquet: read in pieces of any size, checked in one pass, with errors that name file and row."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tawin_nemo.data import history_checks, history_files
from tawin_nemo.data.histories import PreparedHistories, newest_rows
from tawin_nemo.data.history_checks import count_histories
from tawin_nemo.data.history_files import HistoryFiles
from tawin_nemo.data.interactions import Dataset, ItemFrame, Split
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError

ITEMS = ["a", "b", "7", "8"]


def opened(path: Path) -> HistoryFiles:
    return HistoryFiles(path, ITEMS, key="recommend.histories")


def write(path: Path, users: list, lists: list, *, group: int = 1000, kind: pa.DataType | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"user_id": pa.array(users), "other": pa.nulls(len(users)), "item_ids": pa.array(lists, type=kind)}
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """23 users in three files with several row groups; user k has the items (k, k + 1, ...) modulo 4."""
    users = [f"u{number}" for number in range(23)]
    lists = [[ITEMS[(number + step) % 4] for step in range(1 + number % 3)] for number in range(23)]
    for name, begin, end in (("a.parquet", 0, 9), ("part=1/b.parquet", 9, 10), ("part=2/c.parquet", 10, 23)):
        write(tmp_path / "in" / name, users[begin:end], lists[begin:end], group=4)
    write(tmp_path / "in" / "_ignored.parquet", ["x"], [["a"]])
    return tmp_path / "in"


@pytest.mark.parametrize("size", [1, 4, 7, 23, 100])
def test_pieces_of_any_size_hold_every_row_once(folder: Path, size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(history_files, "BATCH_ROWS", 3)
    files = opened(folder)
    assert files.rows == 23
    users, items = [], []
    for begin in range(0, 23, size):
        rows = files.read(begin, min(begin + size, 23))
        users += rows.keys["user_id"].to_pylist()
        items += [rows.items[row].tolist() for row in range(len(rows))]
    assert users == [f"u{number}" for number in range(23)]
    assert items == [[(number + step) % 4 for step in range(1 + number % 3)] for number in range(23)]


def test_rows_are_found_wherever_reading_starts(folder: Path):
    files = opened(folder)
    for begin, end in ((20, 23), (3, 12), (9, 10), (0, 1), (1, 2), (9, 9)):
        assert files.read(begin, end).keys["user_id"].to_pylist() == [f"u{number}" for number in range(begin, end)]


def test_a_digest_depends_on_the_rows_and_not_on_the_files(folder: Path, tmp_path: Path):
    whole = opened(folder).read(0, 23)
    lists = [[ITEMS[item] for item in whole.items[row]] for row in range(23)]
    users = whole.keys["user_id"].to_pylist()
    one = write(tmp_path / "one.parquet", users, lists, kind=pa.large_list(pa.large_string()))
    assert opened(one).read(0, 23).digest == whole.digest
    lists[22].append("a")
    assert opened(write(tmp_path / "other.parquet", users, lists)).read(0, 23).digest != whole.digest
    assert opened(one).read(0, 22).digest != whole.digest


@pytest.mark.parametrize(
    ("users", "lists", "kind"),
    [
        ([1, 2], [[7], [8, 7]], pa.list_(pa.int64())),
        (["1", "2"], [["7"], ["8", "7"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    ],
)
def test_ids_may_be_numbers_or_dictionaries(tmp_path: Path, users: list, lists: list, kind: pa.DataType):
    rows = opened(write(tmp_path / "in.parquet", users, lists, kind=kind)).read(0, 2)
    assert rows.keys["user_id"].to_pylist() == users
    assert [rows.items[row].tolist() for row in range(2)] == [[2], [3, 2]]


def test_one_pass_counts_what_cannot_be_answered(tmp_path: Path):
    lists = [["a"], [], ["x", "a", None], None, ["x", "y"]]
    files = opened(write(tmp_path / "in.parquet", list("abcde"), lists))
    counts = count_histories(files)
    assert (counts.rows, counts.empty, counts.emptied, counts.unknown, counts.with_unknown) == (5, 2, 1, 4, 2)
    assert counts.unknown_names == ["x", "None", "y"]
    assert counts.first_empty == f"recommend.histories: row 1 of {tmp_path / 'in.parquet'}"
    rows = files.read(0, 5)
    assert [rows.items[row].tolist() for row in range(5)] == [[0], [], [0], [], []]
    assert rows.unknown_N.tolist() == [0, 0, 2, 0, 2]


@pytest.mark.parametrize("most", [1 << 22, 5])
def test_repeated_users_are_found_in_memory_and_on_disk(tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(history_checks, "MOST_HASHES", most)
    users = [f"u{number}" for number in range(60)]
    count_histories(opened(write(tmp_path / "good.parquet", users, [["a"]] * 60)))
    users[50] = users[50 + 1] = "u7"
    bad = write(tmp_path / "bad.parquet", users, [["a"]] * 60)
    with pytest.raises(DataError, match=re.escape("bad.parquet: user_id 'u7' stands also in row 7 of ")) as error:
        count_histories(opened(bad))
    assert "row 50 of" in str(error.value)
    assert "1 users have more than one history" in str(error.value)


def test_equal_hashes_of_different_users_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import polars as pl

    monkeypatch.setattr(history_checks, "_hashes", lambda users: pl.Series(np.zeros(len(users), dtype=np.uint64)))
    counts = count_histories(opened(write(tmp_path / "in.parquet", ["a", "b", "c"], [["a"], [], ["a"]])))
    assert counts.empty == 1  # all rows were read
    with pytest.raises(DataError, match="user_id 'b' stands also in row 1 of "):
        count_histories(opened(write(tmp_path / "twice.parquet", ["a", "b", "c", "b"], [["a"]] * 4)))


@pytest.mark.parametrize(
    ("users", "lists", "message"),
    [
        (["a", "b"], ["a", "b"], "column 'item_ids' holds string; write lists of text or whole numbers"),
        (["a"], [[0.5]], "column 'item_ids' holds list<element: double>"),
        ([0.5], [["a"]], "column 'user_id' holds double; write ids as text or whole numbers"),
    ],
)
def test_wrong_types_are_named(tmp_path: Path, users: list, lists: list, message: str):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'in.parquet'}: {message}")):
        opened(write(tmp_path / "in.parquet", users, lists))


def test_mistakes_name_the_key_and_the_file(tmp_path: Path, folder: Path):
    with pytest.raises(DataError, match=r"recommend\.histories=.*nowhere is neither a file nor a folder"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no file \*\.parquet"):
        opened(tmp_path / "empty")
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(DataError, match=r"text\.parquet cannot be read as Parquet"):
        opened(tmp_path / "text.parquet")
    pq.write_table(pa.table({"user": ["a"]}), tmp_path / "columns.parquet")
    with pytest.raises(DataError, match=r"has no column 'user_id'; it has user\. Needed are user_id"):
        opened(tmp_path / "columns.parquet")
    with pytest.raises(DataError, match=r"row 1 of .*: user_id is empty"):
        opened(write(tmp_path / "null.parquet", ["a", None], [["a"], ["b"]])).read(0, 2)
    write(folder / "z.parquet", [5], [["a"]])
    with pytest.raises(DataError, match=r"user_id is text in one of .*a\.parquet and .*z\.parquet, numbers in the"):
        opened(folder)


def test_memory_does_not_grow_with_the_users(tmp_path: Path):
    """A file of 200,000 users in pieces of 1,000: what Arrow holds after each piece is a part of a per cent of all."""
    users, items = np.arange(200_000), np.tile([7, 8], 800_000)
    lists = pa.ListArray.from_arrays(pa.array(np.arange(0, len(items) + 1, 8), pa.int32()), pa.array(items))
    pq.write_table(pa.table({"user_id": users, "item_ids": lists}), tmp_path / "in.parquet", row_group_size=200_000)
    files = opened(tmp_path / "in.parquet")
    before, held = pa.total_allocated_bytes(), []
    for begin in range(0, 100_000, 1000):
        files.read(begin, begin + 1000)
        held.append(pa.total_allocated_bytes() - before)
    assert max(held[50:]) < 1.5 * max(held[:50])
    assert max(held) < 6_000_000  # all of it as numbers: 14 MB, decoded 27 MB


def split(users: list[int], histories: list[list[int]], targets: list[int]) -> Split:
    return Split(np.array(users), TokenRows.from_lists(histories), np.array(targets), np.arange(len(users)))


class Named(Dataset):
    """Users 2 and 5 have external ids."""

    def user_ids(self, user_N: np.ndarray) -> list[str | None]:
        return [{2: "two", 5: "five"}.get(number) for number in user_N.tolist()]


def test_prepared_users_have_their_newest_history_with_its_target():
    train = split([5, 2, 5], [[0], [1, 2], [0, 1]], [1, 3, 2])
    valid, test = split([2], [[1, 2, 3]], [0]), split([9, 9], [[3], [3, 1]], [1, 0])
    rows = newest_rows([train, valid, test])
    assert rows.user_N.tolist() == [2, 5, 9]
    assert [rows.history[row].tolist() for row in range(3)] == [[1, 2, 3, 0], [0, 1, 2], [3, 1, 0]]
    data = Named(ItemFrame(ITEMS, ITEMS, [""] * 4), train, valid, test, {})
    users = PreparedHistories.of_users(data)
    assert users.read(1, 3).keys["user_id"].to_pylist() == ["five", "9"]
    assert [users.read(1, 3).items[row].tolist() for row in range(2)] == [[0, 1, 2], [3, 1, 0]]
    found = PreparedHistories(data, test, users=False).read(0, 2)
    assert found.keys["row"].to_pylist() == [0, 1]
    assert found.keys["user_id"].to_pylist() == [None, None]
