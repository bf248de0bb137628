"""Reading semantic-ID indexes: good ones, and every way in which one can fail to fit the catalog."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tawin_nemo.catalog.semantic_ids import find_codes, load_codes
from tawin_nemo.util.errors import CatalogError, ConfigError


def written(folder: Path, text: object) -> Path:
    path = folder / "index.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def numbered(items: int) -> list[str]:
    """Items that are named by their numbers."""
    return [str(item) for item in range(items)]


def test_codes_belong_to_external_ids_not_to_positions(tmp_path: Path) -> None:
    """One item left the catalog and one came: as many items as before, every later number shifted by one."""
    codes = {name: [f"<a_{at}>", f"<b_{at}>"] for at, name in enumerate(["B1", "B3", "B5", "B7"])}
    for index in (codes, {str(at): words for at, words in enumerate(codes.values())}):
        path = written(tmp_path, index)
        (tmp_path / "items.json").write_text(json.dumps(list(codes)))
        assert load_codes(path, ["B7", "B5", "B1", "B3"]) == [codes[name] for name in ("B7", "B5", "B1", "B3")]
        with pytest.raises(CatalogError, match=r"1 have no codes: 'B2'; 1 are not in the catalog: 'B1'"):
            load_codes(path, ["B2", "B3", "B5", "B7"])


def test_numbers_that_nothing_explains_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"0": ["<a_1>"], "1": ["<a_2>"]})
    with pytest.raises(CatalogError, match=r"numbers its items, but this catalog names them"):
        load_codes(path, ["B1", "B2"])
    assert load_codes(path, ["1", "0"]) == [["<a_2>"], ["<a_1>"]]  # the items are named by these very numbers


@pytest.mark.parametrize("names", ['["B1"]', '["B1", 2]', "{}", "["])
def test_a_list_of_items_that_does_not_fit_is_refused(tmp_path: Path, names: str) -> None:
    path = written(tmp_path, {"0": ["<a_1>"], "1": ["<a_2>"]})
    (tmp_path / "items.json").write_text(names)
    with pytest.raises(CatalogError, match=r"items\.json"):
        load_codes(path, ["B1", "B2"])


def test_codes_come_in_item_order_whatever_their_number(tmp_path: Path) -> None:
    path = written(tmp_path, {"1": ["<a_2>", "<b_1>", "<c_9>", "<d_0>"], "0": ["<a_1>", "<b_1>", "<c_3>"]})
    assert load_codes(path, numbered(2)) == [["<a_1>", "<b_1>", "<c_3>"], ["<a_2>", "<b_1>", "<c_9>", "<d_0>"]]


def test_missing_and_extra_items_are_listed(tmp_path: Path) -> None:
    path = written(tmp_path, {"0": ["<a_1>"], "7": ["<a_1>"], "x": ["<a_1>"]})
    with pytest.raises(CatalogError) as error:
        load_codes(path, numbered(3))
    assert "2 have no codes: '1', '2'" in str(error.value)
    assert "2 are not in the catalog: '7', 'x'" in str(error.value)


@pytest.mark.parametrize("codes", [[], "<a_1>", ["<a_1>", 3], ["<a_1>", ""], ["<a 1>"], None, {"a": 1}])
def test_ill_formed_codes_are_listed(tmp_path: Path, codes: object) -> None:
    with pytest.raises(CatalogError, match="1 have codes that are not a list of words: '1'"):
        load_codes(written(tmp_path, {"0": ["<a_1>"], "1": codes}), numbered(2))


@pytest.mark.parametrize("codes", [["<a_1>"], ["<a_1>", "<b_1>", "<c_1>", "<d_1>", "<e_1>"]])
def test_another_depth_is_listed(tmp_path: Path, codes: list[str]) -> None:
    """One code more tells apart items with equal codes; anything else is a damaged index."""
    index = {str(item): ["<a_1>", "<b_1>", f"<c_{item}>"] for item in range(5)} | {"3": codes}
    message = "1 have another number of codes than 3, or one more or less: '3'"
    with pytest.raises(CatalogError, match=message):
        load_codes(written(tmp_path, index), numbered(5))
    index["3"] = [*codes, "<b_1>"] if len(codes) == 1 else codes[:4]
    assert load_codes(written(tmp_path, index), numbered(5))[3] == index["3"]


def test_an_item_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="1 are named twice: '0'"):
        load_codes(written(tmp_path, '{"0": ["<a_1>"], "0": ["<a_2>"]}'), numbered(1))


@pytest.mark.parametrize("text", ["", "{", "[]", '[["0", ["<a_1>"]]]', "3"])
def test_files_that_hold_no_index_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CatalogError, match=r"index\.json"):
        load_codes(written(tmp_path, text), numbered(1))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="absent"):
        load_codes(tmp_path / "absent.json", numbered(1))


@pytest.mark.real_data
@pytest.mark.parametrize("kind", ["minionerec", "rqkmeans_constrained"])
def test_the_public_indexes_can_be_read(industrial: Path, kind: str) -> None:
    codes = load_codes(industrial / f"Industrial_and_Scientific.index.{kind}.json", numbered(3686))
    assert len(codes) == 3686
    assert {len(item) for item in codes} <= {3, 4}


def test_the_index_is_named_or_the_only_one_that_matches(tmp_path: Path) -> None:
    one = tmp_path / "Toys.index.rq.json"
    one.write_text("{}", encoding="utf-8")
    assert find_codes(tmp_path, "Toys.index.rq.json") == find_codes(tmp_path, "*.index*.json") == one
    assert find_codes(Path("/elsewhere"), str(one)) == one
    with pytest.raises(ConfigError, match=r"no file .*other\.json; code files there: Toys\.index\.rq\.json"):
        find_codes(tmp_path, "other.json")
    (tmp_path / "Toys.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"2 files match .*Toys\.index\.json, Toys\.index\.rq\.json"):
        find_codes(tmp_path, "*.index*.json")
