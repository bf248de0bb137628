"""Splits mapped into memory: the same rows as in the Parquet files, converted once, and never damaged or outdated."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data import split_arrays
from tawin_nemo.data.interactions import MANIFEST, Split, load_dataset
from tawin_nemo.data.split_arrays import RECORD, Arrays, open_arrays
from tawin_nemo.data_prep.prepare import prepare
from tawin_nemo.types import CANDIDATES, HISTORY, SPLITS, TARGET, TokenRows
from tawin_nemo.util.errors import DataError
from tests.data.test_interactions import edit

#: An item that is not the target.
OTHER = pl.when(pl.col(TARGET) == 0).then(1).otherwise(0).cast(pl.Int64)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = PrepareConfig(synthetic_items=60, synthetic_users=120)
    out = tmp_path_factory.mktemp("prepared") / "out"
    return prepare("synthetic", Path(), out, prepare=options, data=DataConfig(), seed=1)


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def columns(split: Split) -> dict[str, list[int]]:
    rows = {"history": split.history} | ({} if split.candidates is None else {"candidates": split.candidates})
    flat = {name: part.flat.tolist() for name, part in rows.items()}
    flat |= {f"{name}_offsets": part.offsets.tolist() for name, part in rows.items()}
    return flat | {"user": split.user_N.tolist(), "target": split.target_N.tolist(), "time": split.time_N.tolist()}


def assert_equal(arrays: Arrays, root: Path) -> None:
    mapped, read = load_dataset(root, arrays), load_dataset(root)
    for name in SPLITS:
        assert columns(getattr(mapped, name)) == columns(getattr(read, name))
        assert getattr(mapped, name).history.flat.dtype == np.int32
        assert not len(getattr(read, name)) or isinstance(getattr(mapped, name).history.flat.base, np.memmap)
    assert mapped.items == read.items


@pytest.mark.parametrize("rows", [7, 1 << 16])
def test_arrays_equal_the_files(copy: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_arrays, "_ROWS", rows)
    shown = pl.concat_list(TARGET, OTHER).alias(CANDIDATES)
    edit(copy, "valid.parquet", lambda frame: frame.with_columns(shown))
    edit(copy, "test.parquet", lambda frame: frame.head(0))
    arrays = open_arrays(copy)
    assert not arrays.temporary
    assert_equal(arrays, copy)


def test_arrays_are_converted_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_arrays(copy)
    hashed: list[str] = []

    def sha256(path: Path) -> str:
        hashed.append(path.name)
        return split_arrays_sha256(path)

    split_arrays_sha256 = split_arrays.sha256
    monkeypatch.setattr(split_arrays, "_convert", lambda *unused: pytest.fail("converted again"))
    monkeypatch.setattr("tawin_nemo.data.interactions.sha256", sha256)
    assert open_arrays(copy) == first
    assert hashed == []  # the files have not changed since
    os.utime(copy / "train.parquet")
    assert open_arrays(copy) == first
    assert hashed == ["train.parquet"]
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]


def test_an_edited_file_is_refused_beside_its_arrays(copy: Path) -> None:
    open_arrays(copy)
    content = bytearray((copy / "train.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "train.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.parquet is damaged"):
        open_arrays(copy)
    (copy / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"train\.parquet is missing"):
        open_arrays(copy)


def test_data_that_were_prepared_again_have_arrays_of_their_own(copy: Path) -> None:
    old = open_arrays(copy)
    edit(copy, "train.parquet", lambda frame: frame.head(5))
    new = open_arrays(copy)
    assert new.folder != old.folder
    assert len(new.split("train")) == 5


@pytest.mark.parametrize("name", [RECORD, "train.history.raw", "valid.target.raw"])
@pytest.mark.parametrize("lost", [True, False])
def test_damaged_arrays_are_converted_again(copy: Path, name: str, lost: bool) -> None:
    path = open_arrays(copy).folder / name
    if lost:
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    again = open_arrays(copy)
    assert not again.temporary
    assert_equal(again, copy)


def test_a_folder_that_cannot_be_written_is_left_alone(copy: Path, tmp_path: Path, monkeypatch) -> None:
    (copy / "arrays").write_text("a file in the way")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arrays = open_arrays(copy)
    assert arrays.temporary
    assert arrays.folder.parent == tmp_path
    assert_equal(arrays, copy)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="set TMPDIR"):
        open_arrays(copy)


def test_another_process_may_be_first(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = split_arrays._convert

    def slowly(root: Path, manifest: dict, folder: Path) -> Path:
        monkeypatch.setattr(split_arrays, "_convert", convert)
        open_arrays(root)
        return convert(root, manifest, folder)

    monkeypatch.setattr(split_arrays, "_convert", slowly)
    arrays = open_arrays(copy)
    assert_equal(arrays, copy)
    assert [path.name for path in (copy / "arrays").iterdir()] == [arrays.folder.name]


def in_row_9(column: str, value: pl.Expr) -> pl.Expr:
    return pl.when(pl.int_range(pl.len()) == 9).then(value).otherwise(column).alias(column)


NO_ITEMS = pl.lit([], pl.List(pl.Int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([in_row_9(TARGET, pl.lit(99_999))], "'target' names item 99999, the catalog has 0"),
        ([in_row_9(HISTORY, NO_ITEMS)], "row 9 has an empty history"),
        ([in_row_9(TARGET, pl.lit(None, pl.Int64))], "'target' has 1 empty cells"),
        ([pl.concat_list(in_row_9(TARGET, OTHER)).alias(CANDIDATES)], "of row 9 lacks its target"),
        ([], "no column 'time'"),
    ],
)
def test_wrong_content_is_refused_as_without_arrays(copy: Path, change, message: str, monkeypatch) -> None:
    monkeypatch.setattr(split_arrays, "_ROWS", 4)
    edit(copy, "train.parquet", lambda frame: frame.with_columns(change) if change else frame.drop("time"))
    for read in (open_arrays, load_dataset):
        with pytest.raises(DataError, match=message):
            read(copy)
    assert [*(copy / "arrays").iterdir()] == []


def test_the_record_names_every_array(copy: Path) -> None:
    folder = open_arrays(copy).folder
    record = json.loads((folder / RECORD).read_text())
    named = {entry["file"] for split in record["arrays"].values() for entry in split.values()}
    assert named == {path.name for path in folder.iterdir()} - {RECORD}
    assert record["sources"].keys() == json.loads((copy / MANIFEST).read_text())["files"].keys()
    assert TokenRows(np.array([1, 2], np.int32), np.array([0, 2])).take(np.array([0])).flat.dtype == np.int64
