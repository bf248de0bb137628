"""What requests changed in the catalog is there again after a restart, and only in the catalog that it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tawin_nemo.api.control_schema import ItemToAdd
from tawin_nemo.serve.engine.catalog import NewItem
from tawin_nemo.serve.engine.saved_changes import SavedChanges
from tawin_nemo.util.errors import CatalogError
from tests.serve.scene import IDS, TITLES, Scene, first_catalog, serving

NEW = [ItemToAdd(external_id=f"N{number}", title=f"new chair {number}") for number in range(3)]
#: The first item with another title.
OTHER = ItemToAdd(external_id=IDS[0], title="a lamp for the table")


def titles(scene: Scene) -> dict[str, str]:
    """External id -> title of every item that can be recommended."""
    with scene.client() as client:
        return {item.external_id: item.title for item in client.search_items(limit=100).items}


def test_a_restart_serves_what_was_in_use(tmp_path: Path) -> None:
    file = tmp_path / "catalog.json"
    with serving(saved=file) as scene, scene.controller() as control:
        assert not file.exists()
        control.change_items(add=NEW[:2], remove=[IDS[5]])
        control.change_items(add=[NEW[2], OTHER], remove=[IDS[0], "N1"])
        before = titles(scene)
        asked = scene.client().recommend([3], n=40, beams=60)
    with serving(saved=file) as scene:
        assert titles(scene) == before
        assert before.keys() == {*IDS, "N0", "N2"} - {IDS[5]}
        assert before[IDS[0]] == OTHER.title
        again = scene.client().recommend([3], n=40, beams=60)
        assert (again.catalog_version, asked.catalog_version) == (3, 3)
        assert {item.external_id: item.score for item in again.items} == {
            item.external_id: item.score for item in asked.items
        }
        with scene.controller() as control:
            assert control.change_items(add=[NEW[1]], remove=["N0"]).catalog_version == 4
    assert [item["external_id"] for item in json.loads(file.read_text())["add"]] == ["N2", IDS[0], "N1"]


def test_what_is_taken_back_is_not_kept(tmp_path: Path) -> None:
    file, catalog = tmp_path / "catalog.json", tmp_path / "items.jsonl"
    whole = [{"external_id": name, "title": title} for name, title in zip(IDS[:9], TITLES, strict=False)]
    catalog.write_text("".join(json.dumps(item) + "\n" for item in [*whole, {"external_id": "N9", "title": "red new"}]))
    with serving([tmp_path], saved=file, keep_versions=1) as scene, scene.controller() as control:
        built = control.build_catalog(str(catalog)).candidate
        control.validate_catalog(built)
        control.activate_catalog(built)
        state = json.loads(file.read_text())
        assert (len(state["remove"]), [item["external_id"] for item in state["add"]]) == (len(IDS) - 9, ["N9"])
        control.rollback()
    assert json.loads(file.read_text())["remove"] == []
    with serving(saved=file) as scene:
        assert titles(scene).keys() == set(IDS)


def test_changes_of_another_catalog_and_damaged_files_are_named(tmp_path: Path) -> None:
    file, first = tmp_path / "catalog.json", first_catalog()
    SavedChanges(file, first).save(first.changed([NewItem("N0", "new chair")], [IDS[1], IDS[2]], 2))
    other = first.changed([], [IDS[7]], 1)
    with pytest.raises(CatalogError, match="holds 1 items added to, and 2 removed from, another catalog"):
        SavedChanges(file, other).restored(other)
    state = json.loads(file.read_text())
    for damage, message in [
        ({"fingerprint": "0"}, "does not lead to the catalog"), ({"format": 2}, "format 2 is not 1"),
        ({"add": [{"external_id": "N0"}]}, "KeyError: 'title'"), ({"remove": ["nothing"]}, "not in the catalog"),
    ]:  # fmt: skip
        file.write_text(json.dumps(state | damage))
        with pytest.raises(CatalogError, match=message):
            SavedChanges(file, first).restored(first)
    file.write_text(file.read_text()[:50])
    with pytest.raises(CatalogError, match="remove the file to serve without it"):
        SavedChanges(file, first).restored(first)
