"""Filters by the fields of items give what the list of the same items gives, and what is unknown is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tawin_nemo.api.control_schema import ItemToAdd
from tawin_nemo.api.schema import RecommendationRequest
from tawin_nemo.config.schema import ServeConfig
from tawin_nemo.serve.engine.item_fields import ItemFields, MatchCache, UnknownFilter
from tawin_nemo.serve.http.requests import ServerContext, parse_recommendation
from tests.serve.scene import IDS, TITLES, first_catalog, serving, tokenizer
from tests.serve.test_refused_together import two_ranks

ALL = len(TITLES)
CATEGORY = ["lamps", "tables", "chairs"]
ROWS: list[dict[str, Any]] = [
    {
        "item": number, "external_id": IDS[number], "title": TITLES[number], "category": CATEGORY[number % 3],
        "brand": None if number % 7 == 0 else f"brand {number % 4}", "price": float(number % 5),
        "year": 2000 + number % 2,
        "new": number % 2 == 0, "tags": [f"t{number % 2}", f"u{number % 3}"] if number % 5 else None,
        "shape": {"wide": number},
    }
    for number in range(ALL)
]  # fmt: skip
KNOWN = "brand, category, external_id, new, price, tags, title, year"
FILTERS: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({"category": "lamps"}, lambda row: row["category"] == "lamps"),
    ({"category": ["lamps", "chairs"]}, lambda row: row["category"] != "tables"),
    (
        {"category": "lamps", "brand": ["brand 1", "brand 2"]},
        lambda row: row["category"] == "lamps" and row["brand"] in ("brand 1", "brand 2"),
    ),
    ({"price": 3}, lambda row: row["price"] == 3.0),
    ({"price": [0.0, 4], "year": 2001}, lambda row: row["price"] in (0.0, 4.0) and row["year"] == 2001),
    ({"new": True}, lambda row: row["new"]),
    ({"tags": "t1"}, lambda row: "t1" in (row["tags"] or ())),
    ({"tags": ["u0", "t1"], "new": False}, lambda row: bool({"u0", "t1"} & set(row["tags"] or ())) and not row["new"]),
    ({"title": TITLES[3]}, lambda row: row["title"] == TITLES[3]),
    ({"external_id": [IDS[5], IDS[8]]}, lambda row: row["external_id"] in (IDS[5], IDS[8])),
    ({"category": "lamps", "external_id": IDS[1]}, lambda row: False),  # both known, no item has both
]  # fmt: skip


def fields() -> ItemFields:
    """The table comes in another order than the catalog, with brands as a dictionary."""
    table = pa.Table.from_pylist(ROWS[::-1])
    at = table.column_names.index("brand")
    return ItemFields.of(table.set_column(at, "brand", table["brand"].dictionary_encode()), IDS)


def test_a_filter_is_the_list_of_its_items() -> None:
    rng = np.random.default_rng(1)
    cache = MatchCache(fields())
    with serving(filters=cache) as scene, scene.client() as client:
        for values, allowed in FILTERS:
            items = [row["item"] for row in ROWS if allowed(row)]
            more: dict[str, Any]
            for more in (
                {}, {"deny": rng.choice(ALL, 9, replace=False).tolist()}, {"exclude_history": True},
                {"allow": rng.choice(ALL, 25, replace=False).tolist(), "deny": [int(rng.integers(ALL))]},
            ):  # fmt: skip
                listed = [item for item in items if item in more.get("allow", items)]
                for beams in (3, ALL):
                    common = {"n": 3, "beams": beams, "score_space": "trie"}
                    got = client.recommend([1, 7], filter=values, **common, **more)
                    expected = client.recommend([1, 7], **common, **{**more, "allow": listed})
                    assert got.items == expected.items, (values, more)
                    assert {item.item for item in got.items} <= set(listed)
        assert cache.evaluations == len(FILTERS)
        assert client.models().data[0].item_fields == KNOWN.split(", ")


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ({"colour": "red"}, "unknown_field", rf"items have no field 'colour'; they have {KNOWN}"),
        ({"shape": "wide"}, "unknown_field", "no field 'shape'"),
        ({"category": "lamp"}, "unknown_value", rf"no item has category='lamp' \(.*'tables'.*; fields: {KNOWN}"),
        ({"category": ["lamps", "lamp"]}, "unknown_value", "category='lamp'"),
        ({"category": 3}, "unknown_value", "category=3"),
        ({"category": "half an emoji \ud83d"}, None, "category"),
        ({"price": "3"}, "unknown_value", "price='3'"),
        ({"price": True}, "unknown_value", "price=True"),
        ({"new": 1}, "unknown_value", "new=1"),
        ({"tags": "t2"}, "unknown_value", "tags='t2'"),
        ({"price": 2**53}, "unknown_value", "price=9007199254740992"),
        ({"category": []}, None, "filter.category"),
        ({"category": None}, None, "filter"),
        ({"price": 10**400}, None, "filter"),
        ({f"field {n}": 1 for n in range(17)}, None, "at most 16"),
        ({"category": [f"c{n}" for n in range(60)]}, None, "filter: 60 is above this server's limit of 50"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_a_4xx_that_names_the_fields(
    filtered: Any, values: dict[str, Any], code: str | None, words: str
) -> None:
    with filtered.http() as http:
        answer = http.post(
            "/v1/recommendations", content=json.dumps({"history": [1], "filter": values}).encode(),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code or error["code"])
    assert re.search(words, error["message"]), error["message"]


@pytest.fixture(scope="module")
def filtered() -> Any:
    with serving(filters=MatchCache(fields()), max_items=50) as scene:
        yield scene


def test_a_changed_catalog_is_filtered_as_it_is() -> None:
    """Removed items are not recommended; a new item has the fields of its id, and none where the table lacks it."""
    cache = MatchCache(fields())
    with serving(filters=cache) as scene, scene.client() as client, scene.controller() as control:
        lamps = {row["item"] for row in ROWS if row["category"] == "lamps"}
        assert {
            item.item for item in client.recommend([1], n=ALL, beams=64, filter={"category": "lamps"}).items
        } <= lamps
        control.change_items(remove=[IDS[0], IDS[3]], add=[ItemToAdd(external_id="new", title="old red lamp")])
        control.change_items(
            add=[ItemToAdd(external_id=IDS[3], title="blue old lamp red")]
        )  # another title: a new number
        found = client.recommend([1], n=40, beams=64, filter={"category": "lamps"}).items
        assert {IDS[0], "new"}.isdisjoint(item.external_id for item in found)
        assert "blue old lamp red" in {item.title for item in found}
        assert {item.item for item in found} <= (lamps - {0, 3}) | {ALL + 1}
        (alone,) = client.recommend([1], filter={"title": "old red lamp"}).items
        assert alone.external_id == "new"
        assert cache.evaluations == 3  # lamps in two catalogs, and the title


def test_a_filter_is_evaluated_once_and_the_oldest_is_dropped() -> None:
    cache, catalog = MatchCache(fields(), max_filters=2), first_catalog()
    with ThreadPoolExecutor(8) as pool:
        same = [{"category": ["lamps", "chairs"]}, {"category": ["chairs", "lamps", "chairs"]}] * 16
        assert len({id(match) for match in pool.map(lambda values: cache.match(catalog, values), same)}) == 1
    assert cache.evaluations == 1
    for values in ({"new": True}, {"new": False}, {"category": ["lamps", "chairs"]}):
        cache.match(catalog, values)
    assert cache.evaluations == 4
    small = MatchCache(fields(), max_bytes=1)
    for _ in range(2):
        small.match(catalog, {"new": True})
        small.match(catalog, {"new": True})
        small.match(catalog, {"new": False})
    assert small.evaluations == 4
    with pytest.raises(UnknownFilter):
        small.match(catalog, {"new": "yes"})
    with pytest.raises(UnknownFilter):
        MatchCache().match(catalog, {"category": "lamps"})


def test_two_ranks_search_by_the_same_filter() -> None:
    catalog, context = first_catalog(), ServerContext(
        ServeConfig(), "table", 6, "trie", 0.0, 2048, tokenizer().size, filters=MatchCache(fields())
    )  # fmt: skip
    catalog.warm()
    with two_ranks({}, {}) as pair:

        def hits(**body: Any) -> list[tuple[int, float]]:
            parsed = parse_recommendation(RecommendationRequest(history=[1], n=5, **body), catalog, context)
            pair.engine.submit(parsed.job)
            return [(hit.leaf, hit.score) for hit in parsed.job.future.result(20).prompts[0].hits]

        for values, allowed in FILTERS:
            items = [row["item"] for row in ROWS if allowed(row)]
            assert hits(filter=values) == hits(allow=items)
            assert hits(filter=values, deny=items[:2]) == hits(allow=items[2:])
        assert pair.follower_ended() is None
