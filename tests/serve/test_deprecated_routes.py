"""Deployed callers of the routes and fields that were spelled ``catalogue`` keep working."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tawin_nemo.serve.http import openapi
from tests.serve.scene import IDS, KEY, TITLES, TOKEN, serving

OLD = ("build", "validate", "activate", "items")
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def test_the_old_routes_take_and_give_the_old_field(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    lines = [{"external_id": IDS[item], "title": TITLES[item]} for item in range(5)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with serving(roots=[tmp_path]) as scene, httpx.Client(base_url=scene.control, headers=HEADERS) as http:
        built = http.post("/catalogue/build", json={"path": str(file)}).json()
        assert (built["items"], built["validated"], built["catalogue_version"]) == (5, False, 1)
        candidate = {"catalogue_version": built["candidate"]}
        assert http.post("/catalogue/validate", json=candidate).json()["validated"]
        active = http.post("/catalogue/activate", json=candidate).json()
        assert active["catalogue_version"] == active["catalog_version"] == built["candidate"]
        body = {"add": [{"external_id": "N1", "title": "new lamp"}], "remove": [IDS[0]]}
        changed = http.post("/catalogue/items", json=body).json()
        assert (changed["items"], changed["catalogue_version"]) == (5, scene.engine.catalog.version)
        both = http.post("/catalog/validate", json={**candidate, "catalog_version": 1})
        assert (both.status_code, both.json()["error"]["param"]) == (400, "catalogue_version")


@pytest.mark.parametrize("name", OLD)
def test_the_old_routes_need_the_token(name: str) -> None:
    with serving() as scene:
        for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
            assert httpx.post(f"{scene.control}/catalogue/{name}", headers=headers, json={}).status_code == 401
        assert httpx.post(f"{scene.data}/catalogue/{name}", headers=HEADERS, json={}).status_code in (401, 404)


def test_the_documents_show_the_new_routes_only() -> None:
    for text in openapi.documents().values():
        assert "catalogue" not in text
