"""The synthetic log as raw Amazon files, with every kind of dirt that the reader has to survive."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.data_prep.synthetic_catalog import Catalog
from tawin_nemo.util.files import atomic_path

#: Shares of the items whose metadata is spoiled in one way each; the last four make the item unusable.
ITEM_DIRT = {"html": 0.02, "copied": 0.005, "empty": 0.004, "script": 0.003, "long": 0.003, "absent": 0.003}
#: Extra review lines as shares of the good ones; at least one of each.
REVIEW_DIRT = {
    "repeated": 0.01,
    "broken": 0.002,
    "no user": 0.001,
    "no time": 0.001,
    "odd time": 0.001,
    "array": 0.0005,
}


def write_metadata(path: Path, catalog: Catalog, asins: list[str], generator: np.random.Generator) -> None:
    """One line per item, some spoiled, one repeated and one broken."""
    order = generator.permutation(len(catalog))
    spoiled: dict[int, str] = {}
    begin = 0
    for kind, share in ITEM_DIRT.items():
        count = max(1, round(share * len(catalog)))
        spoiled |= {int(item): kind for item in order[begin : begin + count]}
        begin += count
    donor = int(order[-1])
    lines = []
    for item, asin in enumerate(asins):
        kind = spoiled.get(item, "")
        if kind != "absent":
            title = catalog.titles[donor if kind == "copied" else item]
            lines.append(_line(_metadata(catalog, item, asin, _spoil(title, kind))))
    lines += [lines[0], lines[-1][: len(lines[-1]) // 2] + b"\n"]
    _write(path, lines)


def _metadata(catalog: Catalog, item: int, asin: str, title: str) -> dict[str, Any]:
    words = catalog.titles[item].split()
    return {
        "asin": asin,
        "title": title,
        "description": [f"{' '.join(words[2:5])} by {words[0]}.", "Ships from the warehouse &amp; from stores."],
        "brand": catalog.brand_names[catalog.brand_I[item]],
        "category": [catalog.category_names[catalog.category_I[item]], " ".join(words[3:5])],
        "price": f"${5 + item % 90}.99",
        "feature": [],
    }


def _spoil(title: str, kind: str) -> str:
    if kind == "html":
        first, rest = title.split(" ", 1)
        return f"<b>{first}</b>&nbsp; {rest} "
    if kind == "script":
        return f"{title} var aPageStart = (new Date()).getTime();"
    if kind == "long":
        return " ".join([title] * 12)
    return "" if kind == "empty" else title


def write_reviews(
    path: Path, users: list[str], asins: list[str], time_R: np.ndarray, generator: np.random.Generator
) -> None:
    """One line per review, and the extra lines of REVIEW_DIRT in between."""
    frame = pl.DataFrame({"reviewerID": users, "asin": asins, "unixReviewTime": time_R}).with_columns(
        overall=pl.Series(generator.integers(1, 6, len(users))).cast(pl.Float64),
        verified=pl.lit(True),
        reviewText=pl.lit("Does what it says."),
        summary=pl.lit("Fine"),
    )
    lines = frame.write_ndjson().encode().splitlines(keepends=True)
    extra, places = [], []
    for kind, share in REVIEW_DIRT.items():
        for place in generator.integers(len(lines), size=max(1, round(share * len(lines)))):
            extra.append(_damage(lines[place], kind))
            places.append(int(place))
    keys = np.concatenate([np.arange(len(lines)), np.array(places)])
    order = np.argsort(keys, kind="stable")
    every = lines + extra
    _write(path, [every[index] for index in order])


def _damage(line: bytes, kind: str) -> bytes:
    if kind == "repeated":
        return line
    if kind == "broken":
        return line[: len(line) * 2 // 3] + b"\n"
    if kind == "array":
        return b'["not", "a", "review"]\n'
    review = json.loads(line)
    if kind == "odd time":
        return _line(review | {"unixReviewTime": "last summer"})
    del review["reviewerID" if kind == "no user" else "unixReviewTime"]
    return _line(review)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _write(path: Path, lines: list[bytes]) -> None:
    """Gzip without name and time in its header, so that the same lines give the same bytes."""
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as file,
    ):
        for begin in range(0, len(lines), 10_000):
            file.write(b"".join(lines[begin : begin + 10_000]))
