"""data.dataset=parquet: the folders interactions/ and items/, their columns, and what is said of wrong ones."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tawin_nemo.config.schema import ColumnsConfig, DataConfig, PrepareConfig
from tawin_nemo.data.interactions import Dataset, load_dataset, read_manifest
from tawin_nemo.data_prep.prepare import detect, main, prepare
from tawin_nemo.util.errors import ConfigError, DataError

START = 1_600_000_000
USERS, ITEMS = 8, 6


def rows() -> list[dict]:
    return [
        {"user_id": user, "item_id": f"i{item}", "timestamp": START + 1000 * item + user, "event": "buy", "weight": 2.0}
        for user in range(USERS)
        for item in range(ITEMS)
    ]


def write(root: Path, columns: dict[str, list] | None = None, *, items: dict[str, list] | None = None) -> Path:
    """The folders with ``columns`` in place of those of ``rows``; None takes a column away."""
    log = {name: [row[name] for row in rows()] for name in rows()[0]} | (columns or {})
    names = [f"i{item}" for item in range(ITEMS)]
    texts = {"item_id": names, "title": [f"Bolt {name}" for name in names]} | (items or {})
    for folder, table in (("interactions", log), ("items", texts)):
        (root / folder).mkdir(parents=True)
        pq.write_table(pa.table({name: v for name, v in table.items() if v is not None}), root / folder / "0.parquet")
    return root


def ready(root: Path, **keys) -> Dataset:
    options = PrepareConfig(**{"k_core": 2} | keys)
    return load_dataset(prepare("auto", root, root.parent / "out", prepare=options, data=DataConfig(), seed=0))


def test_the_folders_are_detected_and_read(tmp_path: Path) -> None:
    root = write(tmp_path / "shop", items={"category": [["Tools", "Bolts"]] * ITEMS})
    (root / "interactions" / "_SUCCESS").write_text("")
    (root / "interactions" / "_temporary").mkdir()
    (root / "interactions" / "_temporary" / "0.parquet").write_text("half a file")
    assert detect(root) == "parquet"
    dataset = ready(root)
    assert len(dataset.train) + len(dataset.valid) + len(dataset.test) == USERS * (ITEMS - 1)
    assert dataset.items.titles == [f"Bolt i{item}" for item in range(ITEMS)]
    assert dataset.user_ids(dataset.test.user_N[-1:]) == ["7"]
    assert pq.read_table(tmp_path / "out" / "items.parquet")["category"].to_pylist() == ["Tools > Bolts"] * ITEMS
    assert read_manifest(tmp_path / "out")["name"] == "shop"


@pytest.mark.parametrize(
    "times",
    [
        pa.array([datetime.fromtimestamp(row["timestamp"], UTC) for row in rows()], pa.timestamp("us", "UTC")),
        pa.array([row["timestamp"] * 1000 for row in rows()], pa.int64()),
        pa.array([row["timestamp"] for row in rows()], pa.uint32()),
    ],
)
def test_kinds_of_times(tmp_path: Path, times: pa.Array) -> None:
    dataset = ready(write(tmp_path / "shop", {"timestamp": times}))
    assert int(dataset.test.time_N[-1]) == START + 1000 * (ITEMS - 1) + USERS - 1


def test_dates_are_their_midnight(tmp_path: Path) -> None:
    days = [date(2021, 1, 1 + n % ITEMS) for n in range(USERS * ITEMS)]
    dataset = ready(write(tmp_path / "shop", {"timestamp": days}))
    assert int(dataset.test.time_N[-1]) == int(datetime(2021, 1, ITEMS, tzinfo=UTC).timestamp())


def test_events_and_weights_select(tmp_path: Path) -> None:
    events = ["view" if n % ITEMS == 0 else "buy" for n in range(USERS * ITEMS)]
    weights = [1.0 if n % ITEMS == 1 else 2.0 for n in range(USERS * ITEMS)]
    ready(write(tmp_path / "shop", {"event": events, "weight": weights}), events=["buy"], min_rating=1.5)
    steps = {step["name"]: step["interactions"] for step in read_manifest(tmp_path / "out")["steps"]}
    assert steps["events buy"] == USERS * (ITEMS - 1)
    assert steps["rating >= 1.5"] == USERS * (ITEMS - 2)


def test_without_items_their_ids_are_the_titles(tmp_path: Path) -> None:
    root = write(tmp_path / "shop")
    (root / "items" / "0.parquet").unlink()
    dataset = ready(root)
    assert not dataset.has_titles
    assert dataset.items.titles == [f"i{item}" for item in range(ITEMS)]


def test_a_few_rows_without_a_user_are_skipped_and_numbered_through_the_files(tmp_path: Path) -> None:
    root = write(tmp_path / "shop")
    users = [None if n in (3, 4) else row["user_id"] for n, row in enumerate(rows())]
    more = {"user_id": users, "item_id": ["i0"] * len(users), "timestamp": [START + 7] * len(users)}
    pq.write_table(pa.table(more), root / "interactions" / "1.parquet")
    ready(root)
    problems = read_manifest(tmp_path / "out")["problems"]["interactions"]
    lines = USERS * ITEMS + 4, USERS * ITEMS + 5
    assert problems["reasons"] == {"missing user": {"lines": 2, "first_lines": list(lines)}}


NUMBERS = list(range(USERS * ITEMS))


@pytest.mark.parametrize(
    ("columns", "items", "message"),
    [
        ({"user_id": None}, None, "has no column 'user_id' (text or an integer); it has item_id, timestamp"),
        ({"timestamp": ["2021-03-01"] * len(NUMBERS)}, None, "column 'timestamp' is string; it must be an integer"),
        ({"timestamp": [float(START)] * len(NUMBERS)}, None, "column 'timestamp' is double; it must be an integer"),
        ({"user_id": [[n] for n in NUMBERS]}, None, "it must be text or an integer"),
        ({"item_id": [float(n) for n in NUMBERS]}, None, "column 'item_id' is double"),
        ({"weight": ["much"] * len(NUMBERS)}, None, "column 'weight' is string; it must be a number"),
        ({"event": NUMBERS}, None, "column 'event' is int64; it must be text"),
        ({"user_id": [None, *map(str, NUMBERS[1:40])] + [None] * 8}, None, "9 of 48 rows are unusable"),
        (None, {"title": None}, "has no column 'title' (text)"),
        (None, {"title": list(range(ITEMS))}, "column 'title' is int64; it must be text"),
        ({"timestamp": [n % 2 * START + START * 1000 * (1 - n % 2) for n in NUMBERS]}, None, "unit"),
    ],
)
@pytest.mark.parametrize("engine", ["polars", "duckdb"])
def test_a_broken_contract_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: dict, items: dict, message: str, engine: str
) -> None:
    root = write(tmp_path / "shop", columns, items=items)
    out = tmp_path / "run" / "data"
    assert main([f"--root={root}", "--source=parquet", f"--out={out}", f"--prepare.engine={engine}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


def test_no_interactions_and_damaged_files(tmp_path: Path) -> None:
    root = write(tmp_path / "shop")
    file = root / "interactions" / "0.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"0\.parquet cannot be read as Parquet"):
        ready(root)
    file.unlink()
    with pytest.raises(DataError, match="has no Parquet file; data"):
        prepare("parquet", root, tmp_path / "out", prepare=PrepareConfig(), data=DataConfig(), seed=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": ColumnsConfig(user="who")}, "prepare.columns.user=who, but data.dataset=parquet has fixed"),
        ({"reviews": "log.parquet"}, "prepare.reviews=log.parquet, but data.dataset=parquet has fixed"),
    ],
)
def test_keys_for_other_names_are_refused(tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ready(write(tmp_path / "shop"), **keys)
