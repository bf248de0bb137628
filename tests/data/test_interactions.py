from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import ITEMS_FILE, MANIFEST, load_dataset
from tawin_nemo.data_prep.prepare import prepare
from tawin_nemo.types import EXTERNAL_ID, HISTORY, ITEM, SPLITS, TARGET, TIME, TITLE, USER
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import sha256


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = PrepareConfig(synthetic_items=60, synthetic_users=120)
    out = tmp_path_factory.mktemp("prepared") / "out"
    return prepare("synthetic", Path(), out, prepare=options, data=DataConfig(), seed=1)


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def edit(root: Path, name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Change a file and make the manifest agree, so that only the content can be refused."""
    change(pl.read_parquet(root / name)).write_parquet(root / name)
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["files"][name] = sha256(root / name)
    (root / MANIFEST).write_text(json.dumps(manifest))


def test_equals_what_polars_reads(prepared: Path) -> None:
    dataset = load_dataset(prepared)
    items = pl.read_parquet(prepared / ITEMS_FILE)
    assert items.schema == {
        ITEM: pl.Int64,
        **dict.fromkeys([EXTERNAL_ID, TITLE, "description", "brand", "category", "price"], pl.String),
    }
    assert dataset.items.external_ids == items[EXTERNAL_ID].to_list()
    assert dataset.items.titles == items[TITLE].to_list()
    for name in SPLITS:
        frame, split = pl.read_parquet(prepared / f"{name}.parquet"), getattr(dataset, name)
        assert frame.schema == {USER: pl.Int64, HISTORY: pl.List(pl.Int64), TARGET: pl.Int64, TIME: pl.Int64}
        assert frame.rows() == [
            (user, split.history[row].tolist(), target, time)
            for row, (user, target, time) in enumerate(
                zip(split.user_N.tolist(), split.target_N.tolist(), split.time_N.tolist(), strict=True)
            )
        ]


def test_slice(prepared: Path) -> None:
    train = load_dataset(prepared).train
    part = train.slice(5, 9)
    assert len(part) == 4
    assert part.target_N.tolist() == train.target_N[5:9].tolist()
    assert [part.history[row].tolist() for row in range(4)] == [train.history[row].tolist() for row in range(5, 9)]
    assert len(train.slice(3, 3)) == 0


def test_damage_is_refused(copy: Path) -> None:
    path = copy / "valid.parquet"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"valid\.parquet is damaged"):
        load_dataset(copy)
    path.unlink()
    with pytest.raises(DataError, match=r"valid\.parquet is missing"):
        load_dataset(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "format None"),
        ('{"format": "other"}', "format 'other'"),
        ('{"format": "tawin_nemo.prepared.v1", "files": {}}', r"does not list items\.parquet"),
    ],
)
def test_bad_manifest(copy: Path, text: str, message: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset(copy)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a prepared data set"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("test.parquet", lambda frame: frame.with_columns(pl.lit(99_999).alias(TARGET)), "'target' names item 99999"),
        ("test.parquet", lambda frame: frame.with_columns(pl.lit(-1).alias(TARGET)), "'target' names item -1"),
        ("train.parquet", lambda frame: frame.with_columns(pl.col(HISTORY).list.head(0)), "row 0 has an empty history"),
        ("train.parquet", lambda frame: frame.drop(TIME), "no column 'time'"),
        ("train.parquet", lambda frame: frame.with_columns(pl.lit(None, pl.Int64).alias(USER)), "'user' has .* empty"),
        (ITEMS_FILE, lambda frame: frame.reverse(), "'item' must be 0"),
    ],
)
def test_bad_content(copy: Path, name: str, change: Callable[[pl.DataFrame], pl.DataFrame], message: str) -> None:
    edit(copy, name, change)
    with pytest.raises(DataError, match=message):
        load_dataset(copy)
