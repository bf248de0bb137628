"""Tables: columns, times, filters, unusable rows and files, items without texts."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import ColumnsConfig, DataConfig, PrepareConfig
from tawin_nemo.data.interactions import USERS_FILE, Dataset, load_dataset
from tawin_nemo.data_prep.prepare import detect, main, prepare
from tawin_nemo.data_prep.raw import FRACTION
from tawin_nemo.data_prep.time_columns import parsed_times
from tawin_nemo.run.world import check_titles
from tawin_nemo.types import EXTERNAL_ID, TIME, USER
from tawin_nemo.util.errors import ConfigError, DataError
from tests.data_prep.formats import ITEMS, START, USERS, log, table, title

HEADER = "user_id,item_id,timestamp"


def rows(n: int = 1_000) -> list[tuple[str, str, int]]:
    return [(row.u, row.i, row.time) for row in log()][:n]


def run(root: Path, **options: Any) -> Dataset:
    data = DataConfig(max_history=4)
    return load_dataset(
        prepare("table", root, root / "out", prepare=PrepareConfig(**options), data=data, seed=3)
    )  # fmt: skip


def write(root: Path, lines: list[Any] | None = None, header: str = HEADER, items: bool = True) -> None:
    table(root / "log.csv", header, rows() if lines is None else lines)
    if items:
        table(root / "items.csv", "item_id,title", [(f"B{n:02d}", title(n)) for n in range(ITEMS)])


def interactions(dataset: Dataset, step: str) -> int:
    steps = {entry["name"]: entry["interactions"] for entry in dataset.manifest["steps"]}
    return steps[next(name for name in steps if name.startswith(step))]


# -- ids


def test_ids_stay_text_and_users_can_be_joined(tmp_path: Path) -> None:
    """007 is not 7, and every row of the result leads back to the log's user and item."""
    changed = [(f"00{user}", f"0{item[1:]}", time) for user, item, time in rows()]
    write(tmp_path, changed, items=False)
    dataset = run(tmp_path)
    assert dataset.items.external_ids == [f"00{n}" for n in range(ITEMS)]
    users = pl.read_parquet(tmp_path / "out" / USERS_FILE)
    assert users.schema == {USER: pl.Int64, EXTERNAL_ID: pl.String}
    assert users[EXTERNAL_ID].to_list() == [f"00A{n:02d}" for n in range(USERS)]
    frame = pl.read_parquet(tmp_path / "out" / "test.parquet").join(users, on=USER)
    bought = {(user, time): item for user, item, time in changed}
    ids = dataset.items.external_ids
    assert all(ids[target] == bought[user, time] for target, user, time in
               frame.select("target", EXTERNAL_ID, TIME).iter_rows())  # fmt: skip
    assert dataset.user_ids(dataset.test.user_N[:1] + 1_000) == [None]


def test_whole_floats_of_pandas_are_integers(tmp_path: Path) -> None:
    ids = {"user": [float(row.user) for row in log()], "item": [row.item for row in log()]}
    pl.DataFrame({**ids, "time": [row.time for row in log()]}).write_parquet(tmp_path / "log.parquet")
    dataset = run(tmp_path)
    assert dataset.items.external_ids == [str(n) for n in range(ITEMS)]
    assert dataset.user_ids(dataset.train.user_N[:1]) == ["0"]


def test_parquet_with_nested_ids_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"user": [["a"]], "item": [1], "time": [START]}).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="user column holds lists"):
        run(tmp_path)


# -- times


@pytest.mark.parametrize(
    ("text", "seconds", "fraction"),
    [
        ("1614556800", 1614556800, 0.0),
        ("1614556800.5", 1614556800, 0.5),
        ("1.6145568e9", 1614556800, 0.0),
        ("2021-03-01", 1614556800, 0.0),
        ("2021/03/01", 1614556800, 0.0),
        ("2021-03-01 00:00", 1614556800, 0.0),
        ("2021-03-01 00:00:00", 1614556800, 0.0),
        ("2021-03-01T00:00:00Z", 1614556800, 0.0),
        ("2021-03-01T02:00:00+02:00", 1614556800, 0.0),
        ("2021-03-01 02:00:00+02", 1614556800, 0.0),
        ("2021-02-28T19:00:00-0500", 1614556800, 0.0),
        ("2021-03-01 00:00:00 UTC", 1614556800, 0.0),
        ("2021-03-01T00:00:00.250Z", 1614556800, 0.25),
        ("nan", None, None),
        ("yesterday", None, None),
        ("2021-13-01", None, None),
        ("", None, None),
    ],
)
def test_times_as_text(text: str, seconds: int | None, fraction: float | None) -> None:
    for others in ([], ["2021-03-01", "5", "x"]):  # alone, and in a column with others
        frame = parsed_times(pl.Series([text, *others], dtype=pl.String))
        assert frame[TIME][0] == seconds
        assert frame[FRACTION][0] == (pytest.approx(fraction, abs=1e-6) if fraction is not None else None)


def test_times_of_other_types() -> None:
    moment = datetime(2021, 3, 1, 0, 0, 1, 500_000, tzinfo=UTC)
    for unit in ("ms", "us", "ns"):
        for zone in ("UTC", "America/New_York", None):
            column = pl.Series([moment], dtype=pl.Datetime("us", "UTC")).dt.convert_time_zone(zone or "UTC")
            column = (column if zone else column.dt.replace_time_zone(None)).dt.cast_time_unit(unit)
            assert parsed_times(column).row(0) == (1614556801, 0.5)
    assert parsed_times(pl.Series([date(2021, 3, 1)])).row(0) == (1614556800, 0.0)
    assert parsed_times(pl.Series([1614556800.75, None])).rows() == [(1614556800, 0.75), (None, None)]


@pytest.mark.parametrize("ticks", [1, 10**3, 10**6])
def test_times_in_seconds_milliseconds_and_microseconds_are_the_same(tmp_path: Path, ticks: int) -> None:
    write(tmp_path, [(user, item, time * ticks) for user, item, time in rows()])
    assert run(tmp_path).test.time_N.tolist() == sorted(time for _, _, time in rows())[-6:]


def test_milliseconds_order_what_happens_within_a_second(tmp_path: Path) -> None:
    lines = [(user, item, START * 1000 + 100 * n) for user in ("a", "b") for n, item in enumerate("43210")]
    lines += [("c", item, START * 1000 + n) for n, item in enumerate("01234")]
    write(tmp_path, lines[::-1], items=False)  # the file goes from newest to oldest
    dataset = run(tmp_path, k_core=2)
    assert dataset.train.history[3].tolist() == [4, 3, 2, 1]
    assert dataset.train.target_N[:4].tolist() == [3, 2, 1, 0]


# -- filters


def test_events_and_ratings_are_filtered(tmp_path: Path) -> None:
    kinds = ("purchase", "view", "cart")
    lines = [(*row, kind, 5 if kind == "purchase" else 2) for row in rows() for kind in kinds]
    lines = [(user, item, time + n % 3, kind, stars) for n, (user, item, time, kind, stars) in enumerate(lines)]
    write(tmp_path, lines, f"{HEADER},event_type,stars")
    every = run(tmp_path)
    assert interactions(every, "readable") == 3 * len(rows())
    bought = run(tmp_path, events=["purchase"])
    assert interactions(bought, "events purchase") == len(rows())
    assert bought.test.target_N.tolist() != every.test.target_N.tolist()
    rated = run(tmp_path, min_rating=4)
    assert interactions(rated, "rating >= 4") == len(rows())
    assert rated.test.target_N.tolist() == bought.test.target_N.tolist()
    assert interactions(run(tmp_path, events=["purchase", "cart"]), "events purchase, cart") == 2 * len(rows())
    with pytest.raises(DataError, match=r"events sale.*the log has the events .*view \(72\)"):
        run(tmp_path, events=["sale"])
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"no column is known as the event of .*prepare\.columns\.event"):
        run(tmp_path, events=["sale"])


# -- columns


def test_a_missing_or_misnamed_column_is_named_with_those_that_exist(tmp_path: Path) -> None:
    write(tmp_path, header="who,what,timestamp")
    with pytest.raises(DataError, match=r"log\.csv has the columns who, what, timestamp"):
        detect(tmp_path)
    named = {"user": "who", "item": "what"}
    assert len(run(tmp_path, columns=ColumnsConfig(**named)).items) == ITEMS
    wrong = ColumnsConfig(**(named | {"item": "thing"}))
    with pytest.raises(ConfigError, match=r"prepare\.columns\.item=thing is not in .*who, what, timestamp"):
        run(tmp_path, columns=wrong, reviews="log.csv")


def test_columns_are_keys_of_a_recipe_and_of_the_command_line(tmp_path: Path) -> None:
    write(tmp_path, header="who,what,timestamp")
    words = ["prepare.columns.user=who", "prepare.columns.item=what", "prepare.events=a,b", "prepare.min_rating=3"]
    keys = load_recipe(None, words).prepare
    assert (keys.columns.user, keys.columns.item, keys.events, keys.min_rating) == ("who", "what", ["a", "b"], 3.0)
    with pytest.raises(ConfigError, match=r"did you mean prepare\.columns\.user"):
        load_recipe(None, ["prepare.columns.usr=who"])
    flags = ["--prepare.columns.user=who", "--prepare.columns.item=what", f"--out={tmp_path / 'out'}"]
    assert main([f"--root={tmp_path}", "--source=table", *flags]) == 0
    assert main([f"--root={tmp_path}", f"--out={tmp_path / 'two'}"]) == 2


def test_other_names_give_another_request(tmp_path: Path) -> None:
    """A finished folder is not reused when a column, the split or ties change; defaults leave no trace."""
    write(tmp_path, [(*row, row[0][::-1]) for row in rows()], f"{HEADER},member")
    parameters = run(tmp_path).manifest["request"]["parameters"]
    assert set(parameters) == {"source", "name", "max_history", "start", "end", "k_core", "max_title_words"}
    first = (tmp_path / "out" / "manifest.json").stat().st_ino
    run(tmp_path)
    assert (tmp_path / "out" / "manifest.json").stat().st_ino == first
    other = run(tmp_path, columns=ColumnsConfig(user="member"))
    assert other.user_ids(other.train.user_N[:1])[0] == "00A"
    assert run(tmp_path, ties="random").manifest["request"]["parameters"]["seed"] == 3


# -- unusable rows and files


def test_bad_rows_are_counted_and_too_many_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [",".join(map(str, row)) for row in rows()]
    bad = ["A01,B01", ",B01,1614556800", "A01,,1614556800", "A01,B01,soon"]
    write(tmp_path)
    (tmp_path / "log.csv").write_text("\n".join([HEADER, *good[:9], *bad, *good[9:]]) + "\n")
    dataset = run(tmp_path)
    assert dataset.manifest["problems"]["log.csv"]["unusable"] == 4
    assert dataset.manifest["problems"]["log.csv"]["lines"] == len(good) + 4
    reasons = dataset.manifest["problems"]["log.csv"]["reasons"]
    assert set(reasons) == {
        "2 columns instead of 3", "missing item", "missing user",
        "time is neither a number nor a date such as 2021-03-01 12:30:00",
    }  # fmt: skip
    assert "log.csv: 1 lines skipped (missing user)" in caplog.text
    (tmp_path / "log.csv").write_text("\n".join([HEADER, *good, *(bad * 3)]) + "\n")
    with pytest.raises(DataError, match=r"12 of 84 rows are unusable \(2 columns instead of 3: 3, .* more than 10%"):
        run(tmp_path)
    assert main([f"--root={tmp_path}", "--source=table", f"--out={tmp_path / 'out'}"]) == 2


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    write(tmp_path, items=False)
    plain = (tmp_path / "log.csv").read_bytes()
    expected = run(tmp_path).test.target_N.tolist()
    (tmp_path / "log.csv").write_bytes(gzip.compress(plain, mtime=0))  # gzip without .gz
    assert run(tmp_path).test.target_N.tolist() == expected
    (tmp_path / "log.csv").unlink()
    (tmp_path / "log.csv.gz").write_bytes(plain)  # text that is called .gz
    assert run(tmp_path).test.target_N.tolist() == expected
    (tmp_path / "log.csv.gz").unlink()
    lines = "".join(json.dumps({"user": u, "item": i, "time": t}) + "\n" for u, i, t in rows())
    (tmp_path / "log.txt").write_text("\ufeff" + lines)  # JSON lines with a byte order mark, called text
    assert run(tmp_path).test.target_N.tolist() == expected
    (tmp_path / "log.txt").unlink()
    (tmp_path / "log.csv").write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"))
    assert run(tmp_path).test.target_N.tolist() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.json", json.dumps([{"user": 1}]).encode(), r"log\.json is a JSON array.*jq -c '\.\[\]' log\.json"),
        ("log.json", b"[\n  {\n", "is a JSON array"),
        ("log.json", b'{\n  "user": 1\n}\n', r"over several lines.*jq -c \."),
        ("log.json", gzip.compress(b'[{"user": 1}]', mtime=0), "is a JSON array"),
        ("log.csv", b"PK\x03\x04rest", "ZIP archive or spreadsheet; unpack it"),
        ("log.csv", "user,item,time".encode("utf-16"), "UTF-16 text; convert it: iconv"),
        ("log.csv", gzip.compress(b"user,item,time\n" * 99, mtime=0)[:-9], "gzip stream damaged"),
        ("log.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_is_recognised_and_unusable_is_named_with_the_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        detect(tmp_path)
    with pytest.raises(DataError, match=message):
        run(tmp_path, reviews=name)


def test_latin_1_is_named_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "items.csv").write_bytes("item_id,title\nB01,Müller\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"items\.csv cannot be read as CSV .*iconv -f latin1 -t utf-8"):
        run(tmp_path)


def test_parts_of_one_log_and_patterns(tmp_path: Path) -> None:
    write(tmp_path)
    whole = run(tmp_path).test.target_N.tolist()
    (tmp_path / "log.csv").unlink()
    for part in range(3):
        table(tmp_path / f"log-{part:05d}.csv", HEADER, rows()[part::3])
    assert run(tmp_path).test.target_N.tolist() == whole
    table(tmp_path / "older.csv", HEADER, rows(9))
    with pytest.raises(DataError, match=r"set prepare\.reviews to one file in .*, or a pattern; candidates: log-00000"):
        run(tmp_path)
    assert run(tmp_path, reviews="log-*.csv").test.target_N.tolist() == whole
    with pytest.raises(DataError, match=r"prepare\.reviews='none-\*\.csv': there is no file"):
        run(tmp_path, reviews="none-*.csv")


def test_a_quoted_title_may_hold_separators_and_line_breaks(tmp_path: Path) -> None:
    write(tmp_path)
    titles = [(f"B{n:02d}", f'Bolt, "{n}"\nsteel &amp; zinc') for n in range(ITEMS)]
    table(tmp_path / "items.csv", "item_id,title", titles)
    assert run(tmp_path).items.titles[2] == 'Bolt, "2" steel & zinc'


# -- items without texts


def test_without_an_item_file_titles_are_ids_and_a_language_model_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, items=False)
    dataset = run(tmp_path)
    assert dataset.items.titles == dataset.items.external_ids
    assert not dataset.has_titles
    assert "titles are the item ids, enough for classic baselines" in caplog.text
    with pytest.raises(DataError, match=r"prepare\.metadata=FILE.*baseline\.model=sasrec"):
        check_titles(load_recipe(None, []), dataset)
    check_titles(load_recipe(None, ["baseline.model=sasrec"]), dataset)
    check_titles(load_recipe(None, ["catalog.kind=sid", "catalog.index=x.json"]), dataset)
    write(tmp_path)
    check_titles(load_recipe(None, []), run(tmp_path))


def test_a_title_column_of_the_log_counts_if_it_belongs_to_items(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Amazon's reviews of 2023 have a title, which is the review's."""
    write(tmp_path, [(*row, title(int(row[1][1:]))) for row in rows()], f"{HEADER},title", items=False)
    assert run(tmp_path).items.titles == [title(n) for n in range(ITEMS)]
    write(tmp_path, [(*row, f"Good {n}") for n, row in enumerate(rows())], f"{HEADER},title", items=False)
    assert not run(tmp_path).has_titles
    assert "the column title of log.csv differs between rows of one item: it is no item title" in caplog.text
    named = run(tmp_path, columns=ColumnsConfig(title="title"))
    assert named.has_titles
    assert named.items.titles[0].startswith("Good")
