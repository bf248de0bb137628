from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import load_dataset
from tawin_nemo.data_prep.prepare import detect, prepare

FIRST = datetime(2021, 1, 1, tzinfo=UTC)


def review(user: int, business: int, moment: datetime) -> dict[str, Any]:
    return {
        "review_id": "r",
        "user_id": f"u{user}",
        "business_id": f"b{business}",
        "stars": 4.0,
        "date": moment.strftime("%Y-%m-%d %H:%M:%S"),
        "text": "fine",
    }


def test_yelp(tmp_path: Path) -> None:
    log = [review(u, b, FIRST + timedelta(days=u, seconds=b)) for u in range(5) for b in range(5)]
    log += [review(0, 0, FIRST - timedelta(seconds=1)), review(0, 1, datetime(2022, 1, 1, tzinfo=UTC))]
    last_second = review(4, 0, datetime(2021, 12, 31, 23, 59, 59, tzinfo=UTC))
    broken = [log[0] | {"date": "01.01.2021"}, {"user_id": "u1", "business_id": "b1"}]
    businesses = [
        {"business_id": f"b{b}", "name": f"Caf&eacute; {b}", "city": "Reno", "categories": "Coffee, Tea"}
        for b in range(5)
    ]
    for name, rows in (("review", [*broken, *log, last_second]), ("business", businesses)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"yelp_academic_dataset_{name}.json").write_text(text)
    assert detect(tmp_path) == "yelp"
    out = prepare("auto", tmp_path, tmp_path / "out", prepare=PrepareConfig(), data=DataConfig(), seed=0)
    dataset = load_dataset(out)
    assert [step["interactions"] for step in dataset.manifest["steps"]] == [28, 26, 26, 26, 26, 21]
    assert dataset.items.titles == [f"Café {b}" for b in range(5)]
    assert dataset.items.descriptions == ["Reno"] * 5
    assert dataset.train.history[0].tolist() == [0]
    assert dataset.train.target_N[0] == 1
    assert dataset.train.time_N[0] == FIRST.timestamp() + 1
    assert dataset.test.time_N[-1] == datetime(2021, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()
    reasons = dataset.manifest["problems"]["yelp_academic_dataset_review.json"]["reasons"]
    assert {reason: found["first_lines"] for reason, found in reasons.items()} == {
        "date is not YYYY-MM-DD HH:MM:SS": [1],
        "missing field date": [2],
    }
