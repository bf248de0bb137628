"""prepare.engine=duckdb writes the folder of the engine in memory, byte for byte, whatever the log is like."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import MANIFEST, load_dataset
from tawin_nemo.data_prep import log_store, parquet_rows
from tawin_nemo.data_prep.prepare import prepare
from tawin_nemo.data_prep.ties import order_ties
from tawin_nemo.util.errors import ConfigError, DataError
from tests.data_prep.formats import FORMATS, Format

START = 1_600_000_000
#: Ids whose order differs between bytes, code points, UTF-16 units, case folding and locales.
IDS = [
    "a",
    "B",
    "b",
    "ä",
    "Z",
    "\u00e9",
    "e\u0301",
    "\uffee",
    "\U0001f600",
    "日本",
    "10",
    "9",
    " x",
    "x ",
    "a'b\"c",
    "\u05d0;--",
    "A",
]


def write_log(root: Path, rows: list[tuple[str, str, int]]) -> Path:
    """The contract's folders with ``rows`` (user, item, time) in parts, and an item file without every seventh item."""
    (root / "interactions" / "day=1").mkdir(parents=True)
    (root / "items").mkdir()
    cut = len(rows) // 3
    for place, part in enumerate((rows[:cut], rows[cut:])):
        user, item, time = zip(*part, strict=True) if part else ((), (), ())
        columns = {"user_id": pa.array(user, pa.string()), "item_id": pa.array(item, pa.string())}
        table = pa.table({**columns, "timestamp": pa.array(time, pa.int64())})
        pq.write_table(table, root / "interactions" / ("day=1" if place else "") / f"part-{place}.parquet")
    items = sorted({item for _, item, _ in rows})
    shown = [item for place, item in enumerate(items) if place % 7 != 6]
    titles = [f"Steel bolt {place % 4} mm" for place in range(len(shown))]
    pq.write_table(pa.table({"item_id": pa.array(shown, pa.string()), "title": titles}), root / "items" / "all.parquet")
    return root


def drawn_log(
    seed: int, *, users: int = 12, items: int = 9, rows: int = 220, ticks: int = 1
) -> list[tuple[str, str, int]]:
    """Rows with ties, exact duplicates, ids of many scripts, users and items of few rows, in no order of time."""
    draw = random.Random(seed)
    user_ids = [f"{draw.choice(IDS)}{place}" for place in range(users)]
    item_ids = [f"{draw.choice(IDS)}{place}" for place in range(items)]
    log = [
        (
            user_ids[min(int(draw.expovariate(0.3)), users - 1)],
            item_ids[min(int(draw.expovariate(0.4)), items - 1)],
            START * ticks + draw.randrange(40) * (ticks // 4 if ticks > 1 else 86400),
        )
        for _ in range(rows)
    ]
    return log + draw.sample(log, rows // 10)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def outcome(root: Path, out: Path, engine: str, *, source: str = "parquet", history: int = 10, seed: int = 3, **keys):
    """The files of the prepared folder, or the error's message."""
    options = PrepareConfig(engine=engine, memory_limit_gb=0.25, **keys)
    try:
        prepare(source, root, out, prepare=options, data=DataConfig(max_history=history), seed=seed)
    except (DataError, ConfigError) as error:
        return type(error), str(error)
    return content(out)


def check_equal(root: Path, **keys) -> dict[str, bytes] | tuple[type, str]:
    one = outcome(root, root / "polars" / "data", "polars", **keys)
    two = outcome(root, root / "duckdb" / "data", "duckdb", **keys)
    assert two == one
    assert [path.name for path in (root / "duckdb").iterdir()] in ([], ["data"])  # no temporary folder is left
    return one


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    ties=st.sampled_from(["file", "random", "item"]),
    split=st.sampled_from(["ratio", "leave_one_out", "date"]),
    k_core=st.integers(1, 6),
    history=st.sampled_from([1, 2, 5, 50]),
    ticks=st.sampled_from([1, 1000]),
)
def test_any_log_gives_the_same_bytes(seed: int, ties: str, split: str, k_core: int, history: int, ticks: int) -> None:
    """Milliseconds (ticks=1000) order what happens within a second."""
    dates = {"valid_start": "2020-09-20", "test_start": "2020-10-05"} if split == "date" else {}
    with tempfile.TemporaryDirectory() as folder:
        root = write_log(Path(folder) / "log", drawn_log(seed, ticks=ticks))
        check_equal(root, ties=ties, split=split, k_core=k_core, history=history, seed=seed, **dates)


@pytest.mark.parametrize("ties", ["file", "random", "item"])
@pytest.mark.parametrize("split", ["ratio", "leave_one_out"])
def test_ties_duplicates_and_scripts(tmp_path: Path, ties: str, split: str) -> None:
    root = write_log(tmp_path / "log", drawn_log(1, users=20, items=14, rows=400))
    files = check_equal(root, ties=ties, split=split, k_core=3)
    assert isinstance(files, dict)
    manifest = json.loads(files[MANIFEST])
    steps = {step["name"]: step["interactions"] for step in manifest["steps"]}
    assert steps["exact duplicates removed"] < steps["time window the beginning..the end"]
    assert steps["valid titles"] < steps["exact duplicates removed"]
    assert manifest["statistics"]["ties"]["tied"] > 20
    dataset = load_dataset(root / "duckdb" / "data")
    assert dataset.items.external_ids == sorted(dataset.items.external_ids, key=str.encode)
    assert len(dataset.train) > 50


def test_the_core_of_a_chain_falls_round_by_round(tmp_path: Path) -> None:
    """A chain u0-i0-u1-i1-... loses its two ends in every round; a clique of four stays."""
    chain = [(f"u{n}", f"i{n + step}", START + n) for n in range(40) for step in (0, 1)]
    clique = [(f"v{user}", f"j{item}", START + 100 * user + item) for user in range(4) for item in range(4)]
    root = write_log(tmp_path / "log", [*chain, *clique, ("u0", "i0", START + 999)][:-1])
    (root / "items" / "all.parquet").unlink()
    files = check_equal(root, k_core=2)
    assert isinstance(files, dict)
    steps = json.loads(files[MANIFEST])["steps"]
    assert [step["interactions"] for step in steps if step["name"] == "2-core"] == [16]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"k_core": 200}, "The step '200-core' removed everything: lower prepare.k_core"),
        ({"start": "2030-01"}, "removed everything: the reviews lie between 2020-09-13"),
        ({"split": "date", "valid_start": "2030-01", "test_start": "2030-02"}, "leaves a split empty"),
        ({"k_core": 1, "end": "2020-09-13"}, "samples are left; a split of 8:1:1 needs 10"),
        ({"min_rating": 3}, "has no column 'weight'"),
    ],
)
def test_the_same_errors(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    root = write_log(tmp_path / "log", drawn_log(2, rows=60))
    result = check_equal(root, **keys)
    assert isinstance(result, tuple)
    assert message in result[1]


@pytest.mark.parametrize("entry", [entry for entry in FORMATS if not entry.ready_made], ids=lambda entry: entry.name)
def test_every_format_gives_the_same_bytes(tmp_path: Path, entry: Format) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    entry.write(raw)
    options = dict(entry.options)
    one, two = (
        outcome(raw, tmp_path / engine / "data", engine, source=entry.dataset, history=4, **options)
        for engine in ("polars", "duckdb")
    )
    assert isinstance(one, dict)
    assert two == one


def test_generated_reviews_give_the_same_bytes_and_are_reused(tmp_path: Path) -> None:
    keys = {"synthetic_items": 60, "synthetic_users": 120}
    out = tmp_path / "polars" / "data"
    assert isinstance(check_equal(tmp_path, source="synthetic", **keys), dict)
    written = (out / MANIFEST).stat().st_mtime_ns
    outcome(tmp_path, out, "duckdb", source="synthetic", **keys)
    assert (out / MANIFEST).stat().st_mtime_ns == written


def test_portions_do_not_change_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that come seven at a time, of which a row group takes a few hundred."""
    root = write_log(tmp_path / "log", drawn_log(4, users=60, items=30, rows=900))
    monkeypatch.setattr(parquet_rows, "ROW_GROUP_BYTES", 20_000)
    one = outcome(root, tmp_path / "one", "polars", k_core=2)
    monkeypatch.setattr(log_store, "BATCH_ROWS", 7)
    monkeypatch.setattr("tawin_nemo.data_prep.out_of_core.BATCH_ROWS", 7)
    two = outcome(root, tmp_path / "two", "duckdb", k_core=2, ties="file")
    assert pq.ParquetFile(tmp_path / "two" / "train.parquet").num_row_groups > 2
    assert one == two
    random_ties = [outcome(root, tmp_path / name, name, k_core=2, ties="random") for name in ("polars", "duckdb")]
    assert random_ties[0] == random_ties[1]


def test_the_writer_has_the_bytes_of_datasets(tmp_path: Path) -> None:
    import datasets

    rows = 3000
    history = pa.array([list(range(n % 9)) for n in range(rows)], pa.list_(pa.int64()))
    table = pa.table({"user": np.arange(rows), "history": history, "name": [f"n{n % 70}" for n in range(rows)]})
    parquet_rows.write_table(table, tmp_path / "ours.parquet")
    datasets.Dataset(table).to_parquet(str(tmp_path / "theirs.parquet"))
    assert (tmp_path / "ours.parquet").read_bytes() == (tmp_path / "theirs.parquet").read_bytes()


def test_shuffled_ties_are_numpys_permutation() -> None:
    assert np.array_equal(order_ties(np.zeros(1000), "random", 5), np.random.default_rng([5, 6]).permutation(1000))


def test_no_frame_of_the_log_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python holds one batch of interactions at a time, whatever the number of users is."""
    rows = [(f"u{n % 500}", f"i{n % 20}", START + n) for n in range(5000)]
    root = write_log(tmp_path / "log", rows)
    monkeypatch.setattr("tawin_nemo.data_prep.tables.BATCH_ROWS", 100)
    monkeypatch.setattr(log_store, "BATCH_ROWS", 100)
    tallest, concat = 0, pl.concat

    def watched(frames, *more, **keys):
        nonlocal tallest
        result = concat(frames, *more, **keys)
        tallest = max(tallest, result.height)
        return result

    monkeypatch.setattr(pl, "concat", watched)
    assert isinstance(outcome(root, tmp_path / "out", "duckdb"), dict)
    assert tallest <= 20


def test_too_little_memory_names_the_key_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_log(tmp_path / "log", drawn_log(1))
    import duckdb

    def full(self, query):
        raise duckdb.OutOfMemoryException("Out of Memory Error: could not allocate block\nmore")

    monkeypatch.setattr(log_store.LogStore, "row", full)
    result = outcome(root, tmp_path / "run" / "data", "duckdb")
    assert result[0] is ConfigError
    assert "prepare.memory_limit_gb=0.25 is too little for DuckDB (Out of Memory Error" in result[1]
    assert list((tmp_path / "run").iterdir()) == []


def test_without_duckdb_the_error_names_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_log(tmp_path / "log", drawn_log(1))
    monkeypatch.setitem(sys.modules, "duckdb", None)
    result = outcome(root, tmp_path / "data", "duckdb")
    assert result[0] is ConfigError
    assert "pip install duckdb, or prepare.engine=polars" in result[1]
