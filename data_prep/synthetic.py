"""A made-up review log in the raw Amazon format, with structure to learn and malformed lines to skip.

A user's next item follows the current one by a small successor graph (accessories of the same brand), else it comes
from the user's favourite brand and category, else from anywhere by popularity.

I items, U users, R reviews, L steps of a user.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.data_prep.synthetic_catalog import SUCCESSORS, Catalog, make_catalog
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
#: Probability that the next item is a successor of the current one, and that it is drawn near the user's taste.
P_SUCCESSOR, P_TASTE = 0.64, 0.22
SUCCESSOR_WEIGHTS = np.array([0.48, 0.21, 0.12, 0.08, 0.06, 0.05])
P_STAY_IN_CATEGORY, P_FAVOURITE_BRAND = 0.7, 0.6
FIRST_DAY, START_DAYS = 1_473_984_000, 620  # 2016-09-16 in UTC seconds; first reviews within so many days of it
DAY = 86_400
MAX_REVIEWS = 60
REVIEWS_FILE, METADATA_FILE = "Synthetic.json.gz", "meta_Synthetic.json.gz"


def announcement(num_items: int, num_users: int, reviews_per_user: float) -> str:
    """What ``write_raw`` is about to write, and that its faulty lines are meant to be there."""
    share = sum(REVIEW_DIRT.values()) + sum(ITEM_DIRT.values())
    return (
        f"generating about {round(num_users * reviews_per_user):,} reviews of {num_items:,} items in Amazon's format; "
        f"as real files have them, some lines and titles are faulty (on purpose, up to {100 * share:.1f} %), and the "
        "next lines say what becomes of them"
    )


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
    extra, indices = [], []
    for kind, share in REVIEW_DIRT.items():
        for index in generator.integers(len(lines), size=max(1, round(share * len(lines)))):
            extra.append(_damage(lines[index], kind))
            indices.append(int(index))
    keys = np.concatenate([np.arange(len(lines)), np.array(indices)])
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


@dataclass(frozen=True)
class World:
    """The ground truth of the raw files: the catalog and R reviews by user, in time order within a user."""

    catalog: Catalog
    asins: list[str]
    user_R: np.ndarray
    item_R: np.ndarray
    time_R: np.ndarray  # UTC seconds at midnight; a user has at most one review per day


def make_world(num_items: int, num_users: int, reviews_per_user: float, seed: int) -> World:
    """Draw a catalog and a log. Equal arguments give equal worlds."""
    generator = np.random.default_rng([seed, num_items, num_users])
    catalog = make_catalog(num_items, generator)
    length_U = _lengths(num_users, reviews_per_user, generator)
    item_UL = _walk(catalog, length_U, generator)
    gap_UL = np.where(generator.random(item_UL.shape) < 0.4, 1, 1 + generator.geometric(0.1, item_UL.shape))
    gap_UL[:, 0] = generator.integers(START_DAYS, size=num_users)
    time_UL = FIRST_DAY + DAY * np.cumsum(gap_UL, axis=1)
    mask_UL = np.arange(item_UL.shape[1]) < length_U[:, None]
    user_R = np.repeat(np.arange(num_users), length_U)
    return World(catalog, identifiers("B", num_items), user_R, item_UL[mask_UL], time_UL[mask_UL])


def write_raw(folder: Path, num_items: int, num_users: int, reviews_per_user: float, seed: int) -> World:
    """Write REVIEWS_FILE and METADATA_FILE, dirt included, into ``folder`` and return their ground truth."""
    world = make_world(num_items, num_users, reviews_per_user, seed)
    generator = np.random.default_rng([seed, 1])
    folder.mkdir(parents=True, exist_ok=True)
    write_metadata(folder / METADATA_FILE, world.catalog, world.asins, generator)
    users = identifiers("A", num_users)
    order = np.lexsort((world.time_R, world.item_R))  # as in the public files: by item
    write_reviews(
        folder / REVIEWS_FILE,
        users=[users[user] for user in world.user_R[order]],
        asins=[world.asins[item] for item in world.item_R[order]],
        time_R=world.time_R[order],
        generator=generator,
    )
    return world


def oracle_ranking(world: World, item_N: np.ndarray, k: int) -> np.ndarray:
    """The k likeliest next items after each current item, ``[N, k]``, from the generator's own rules.

    Successors first, then the most popular items of the same brand and category.
    """
    catalog = world.catalog
    group_I = catalog.category_I * len(catalog.brand_names) + catalog.brand_I
    by_popularity = np.argsort(-catalog.popularity_I, kind="stable")
    ranking = np.full((len(item_N), k), -1)
    fill = {group: by_popularity[group_I[by_popularity] == group][: k + SUCCESSORS] for group in np.unique(group_I)}
    for row, item in enumerate(item_N):
        candidates = np.concatenate([catalog.successors_IS[item], fill[group_I[item]]])
        distinct = candidates[np.sort(np.unique(candidates, return_index=True)[1])][:k]
        ranking[row, : len(distinct)] = distinct
    return ranking


def identifiers(letter: str, count: int) -> list[str]:
    """``count`` different identifiers whose order is independent of their number."""
    return [f"{letter}{(number * 387_420_489 + 123_456_789) % 10**9:09d}" for number in range(count)]


def _lengths(num_users: int, mean: float, generator: np.random.Generator) -> np.ndarray:
    shortest = 4 if mean >= 5 else 1
    return np.minimum(shortest - 1 + generator.geometric(1.0 / (mean - shortest + 1), size=num_users), MAX_REVIEWS)


@dataclass(frozen=True)
class _Groups:
    """Draws an item of a group by popularity: the groups lie side by side on a line of cumulative weights."""

    item_I: np.ndarray  # ordered by group
    edge_I: np.ndarray  # cumulative weight after each of them
    low_K: np.ndarray
    high_K: np.ndarray  # equal to low_K for a group without items

    @classmethod
    def of(cls, group_I: np.ndarray, num_groups: int, weight_I: np.ndarray) -> _Groups:
        order = np.argsort(group_I, kind="stable")
        edge_I = np.cumsum(weight_I[order])
        ends = np.searchsorted(group_I[order], np.arange(num_groups), side="right")
        high_K = np.concatenate([[0.0], edge_I])[ends]
        return cls(order, edge_I, np.concatenate([[0.0], high_K[:-1]]), high_K)

    def draw(self, group_N: np.ndarray, uniform_N: np.ndarray) -> np.ndarray:
        low, high = self.low_K[group_N], self.high_K[group_N]
        index = np.searchsorted(self.edge_I, low + uniform_N * (high - low), side="right")
        return self.item_I[np.minimum(index, len(self.item_I) - 1)]

    def has_items(self, group_N: np.ndarray) -> np.ndarray:
        return self.high_K[group_N] > self.low_K[group_N]


def _walk(catalog: Catalog, length_U: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """``item_UL``: all users take their t-th step together; steps beyond a user's length are drawn but not used."""
    users, steps = len(length_U), int(length_U.max())
    brands, categories = len(catalog.brand_names), len(catalog.category_names)
    everything = _Groups.of(np.zeros(len(catalog), dtype=np.int64), 1, catalog.popularity_I)
    by_category = _Groups.of(catalog.category_I, categories, catalog.popularity_I)
    shelf_I = catalog.category_I * brands + catalog.brand_I
    by_shelf = _Groups.of(shelf_I, categories * brands, catalog.popularity_I)

    item_UL = np.zeros((users, steps), dtype=np.int64)
    item_UL[:, 0] = everything.draw(np.zeros(users, dtype=np.int64), generator.random(users))
    favourite_U = catalog.brand_I[item_UL[:, 0]]
    for step in range(1, steps):
        active = np.flatnonzero(length_U > step)
        current = item_UL[active, step - 1]
        kind, pick, stay, loyal, uniform = generator.random((5, len(active)))
        successor = np.searchsorted(np.cumsum(SUCCESSOR_WEIGHTS)[:-1], pick, side="right")
        category = (catalog.category_I[current] + (stay >= P_STAY_IN_CATEGORY)) % categories
        shelf = category * brands + favourite_U[active]
        near = np.where(
            (loyal < P_FAVOURITE_BRAND) & by_shelf.has_items(shelf),
            by_shelf.draw(shelf, uniform),
            by_category.draw(category, uniform),
        )
        anywhere = everything.draw(np.zeros(len(active), dtype=np.int64), uniform)
        item_UL[active, step] = np.where(
            kind < P_SUCCESSOR,
            catalog.successors_IS[current, successor],
            np.where(kind < P_SUCCESSOR + P_TASTE, near, anywhere),
        )
    return item_UL
