"""Raw Amazon files to a prepared folder, on a log small enough to follow by hand."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import load_dataset
from tawin_nemo.data_prep.prepare import prepare
from tawin_nemo.util.errors import DataError

DAY = 86_400
START = int(datetime(2016, 10, 1, tzinfo=UTC).timestamp())
USERS = [f"user{number}" for number in range(5)]
ITEMS = [f"item{number}" for number in range(5)]


def review(user: str, item: str, day: int) -> dict[str, Any]:
    return {"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": START + day * DAY, "reviewText": "x"}


def full_log() -> list[dict[str, Any]]:
    """Every user reviews every item, on a day of its own: a 5-core of 25 interactions and 20 samples."""
    return [review(user, item, 10 * u + i) for u, user in enumerate(USERS) for i, item in enumerate(ITEMS)]


def metadata() -> list[dict[str, Any]]:
    return [
        {
            "asin": item,
            "title": f"Title &amp; {item}",
            "description": ["one", "two"],
            "brand": "B",
            "category": ["a", "b"],
        }
        for item in ITEMS
    ]


def write(root: Path, reviews: list[Any], items: list[Any], name: str = "Toys_and_Games") -> None:
    def lines(rows: list[Any]) -> str:
        return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)

    root.mkdir(exist_ok=True)
    (root / f"{name}.json").write_text(lines(reviews))
    (root / f"meta_{name}.json.gz").write_bytes(gzip.compress(lines(items).encode()))


def run(root: Path, **options: Any) -> Path:
    data = DataConfig(max_history=options.pop("max_history", 3))
    return prepare("amazon", root, root / "out", prepare=PrepareConfig(**options), data=data, seed=0)


def steps(out: Path) -> dict[str, int]:
    return {step["name"]: step["interactions"] for step in load_dataset(out).manifest["steps"]}


def test_every_filter_counts(tmp_path: Path) -> None:
    log = full_log()
    dirty = [
        '{"reviewerID": "user0", "asin"',
        {"asin": "item0", "unixReviewTime": START},
        {"reviewerID": "user0", "asin": "item0", "unixReviewTime": "soon"},
    ]
    outside = [review("user0", "item0", -1), review("user0", "item0", 365 * 2 + 61)]  # 2016-09-30 and 2018-12-01
    inside = [review("user0", "item1", 365 * 2 + 60)]  # 2018-11-30
    refused = [review("user0", item, 1) for item in ("untitled", "unknown")]
    rare = [review("stranger", "item0", 3)]
    write(
        tmp_path,
        dirty + log[:10] + outside + [log[0], log[0]] + refused + log[10:] + rare + inside,
        [*metadata(), {"asin": "untitled", "title": " <br> "}, {**metadata()[0], "title": "second row"}, "{"],
    )
    out = run(tmp_path)
    dataset = load_dataset(out)
    assert steps(out) == {
        "readable reviews": 25 + 2 + 2 + 2 + 1 + 1,
        "time window 2016-10..2018-11": 25 + 2 + 2 + 1 + 1,
        "exact duplicates removed": 25 + 2 + 1 + 1,
        "valid titles": 25 + 1 + 1,
        "5-core": 25 + 1,
        "samples (history <= 3)": 26 - 5,
    }
    assert dataset.items.external_ids == ITEMS
    assert dataset.items.titles == [f"Title & {item}" for item in ITEMS]
    assert dataset.items.descriptions == ["one two"] * 5
    problems = dataset.manifest["problems"]
    assert problems["Toys_and_Games.json"]["unusable"] == 3
    assert problems["Toys_and_Games.json"]["reasons"]["missing field reviewerID"]["first_lines"] == [2]
    assert problems["meta_Toys_and_Games.json.gz"]["reasons"]["not valid JSON"]["first_lines"] == [8]
    assert problems["refused_items"]["empty title"]["first_items"] == ["untitled"]
    assert problems["refused_items"]["no metadata"] == {"items": 1, "reviews": 1, "first_items": ["unknown"]}


def test_samples_follow_the_log(tmp_path: Path) -> None:
    write(tmp_path, full_log()[::-1], metadata())
    dataset = load_dataset(run(tmp_path))
    train = dataset.train
    assert [len(split) for split in (train, dataset.valid, dataset.test)] == [16, 2, 2]
    assert train.user_N[:4].tolist() == [0] * 4
    assert [train.history[row].tolist() for row in range(4)] == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]
    assert train.target_N[:4].tolist() == [1, 2, 3, 4]
    assert train.time_N[:4].tolist() == [START + day * DAY for day in (1, 2, 3, 4)]
    assert dataset.test.time_N.tolist() == [START + day * DAY for day in (43, 44)]


def test_a_repeated_review_counts_where_it_stood_first(tmp_path: Path) -> None:
    """On one day the order of the file decides, and a later copy of a line does not move the review."""
    day = [review("user0", item, 0) for item in ITEMS]
    write(tmp_path, [*day, day[0], *full_log()[5:]], metadata())
    train = load_dataset(run(tmp_path, max_history=9)).train
    assert train.history[3].tolist() == [0, 1, 2, 3]
    assert train.target_N[3] == 4


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"start": "2019-01", "end": "2019-12"}, "the step 'time window 2019-01..2019-12' removed everything"),
        ({"max_title_words": 1}, "the step 'valid titles' removed everything"),
        ({"k_core": 6}, "the step '6-core' removed everything"),
    ],
)
def test_an_empty_result_names_the_filter(tmp_path: Path, options: dict[str, Any], step: str) -> None:
    write(tmp_path, full_log(), metadata())
    with pytest.raises(DataError, match="readable reviews: 25 -> ") as caught:
        run(tmp_path, **options)
    assert step.lower() in str(caught.value).lower()
    assert not (tmp_path / "out").exists()


def test_no_readable_review(tmp_path: Path) -> None:
    write(tmp_path, ["{", "[]"], metadata())
    with pytest.raises(DataError, match=r"'readable reviews' removed everything.*raw review file") as caught:
        run(tmp_path)
    assert "2 unusable lines" in str(caught.value)


def test_too_few_samples_for_three_splits(tmp_path: Path) -> None:
    write(tmp_path, full_log()[:9], metadata())
    with pytest.raises(DataError, match="Only 7 samples are left"):
        run(tmp_path, k_core=1)


def test_brand_category_and_price_are_kept_as_text_for_templates(tmp_path: Path) -> None:
    """Prices are numbers in some releases and texts such as $12.99 in others; an item without one has an empty text."""
    prices = dict(zip(ITEMS, [12.99, "$5.00", None, 7, ""], strict=True))
    items = [{**row, "price": prices[row["asin"]]} for row in metadata()]
    del items[2]["price"]
    write(tmp_path, full_log(), items)
    table = pl.read_parquet(run(tmp_path) / "items.parquet")
    found = dict(zip(table["external_id"], table["price"], strict=True))
    assert found == dict(zip(ITEMS, ["12.99", "$5.00", "", "7", ""], strict=True))
    assert set(table["brand"]) == {"B"}
    assert set(table["category"]) == {"a > b"}
