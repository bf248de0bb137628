from __future__ import annotations

import json
from pathlib import Path

import pytest

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import Dataset, load_dataset
from tawin_nemo.data_prep.prepare import detect, prepare
from tawin_nemo.util.errors import DataError

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token"
ROWS = {"train": ["7\t0\t1", "7\t0 1\t2", "9\t2\t0"], "valid": ["7\t0 1 2\t0"], "test": ["9\t2 0\t1"]}


def write(root: Path, rows: dict[str, list[str]] = ROWS, header: str = HEADER, name: str = "Tiny_Set") -> None:
    for split, lines in rows.items():
        (root / f"{name}.{split}.inter").write_text("\n".join([header, *lines]) + "\n")
    items = {
        str(i): {"title": f"Item {i}", "description": f"d{i}", "brand": "b", "categories": ["x"]} for i in range(3)
    }
    (root / f"{name}.item.json").write_text(json.dumps(items))
    (root / f"{name}.index.small.json").write_text(json.dumps({str(i): [f"<a_{i}>"] for i in range(3)}))


def load(root: Path, out: Path, max_history: int = 10) -> Dataset:
    data = DataConfig(max_history=max_history)
    return load_dataset(prepare("inter", root, out, prepare=PrepareConfig(), data=data, seed=0))


def test_small_set(tmp_path: Path) -> None:
    write(tmp_path)
    assert detect(tmp_path) == "inter"
    dataset = load(tmp_path, tmp_path / "out", max_history=2)
    assert dataset.manifest["name"] == "Tiny_Set"
    assert dataset.items.titles == ["Item 0", "Item 1", "Item 2"]
    assert dataset.train.user_N.tolist() == [7, 7, 9]
    assert dataset.train.time_N.tolist() == [0, 1, 2]
    assert dataset.valid.history[0].tolist() == [1, 2]
    assert dataset.valid.time_N.tolist() == [3]
    assert dataset.test.target_N.tolist() == [1]
    copied = tmp_path / "out" / "Tiny_Set.index.small.json"
    assert copied.read_bytes() == (tmp_path / "Tiny_Set.index.small.json").read_bytes()
    assert copied.name in dataset.manifest["files"]


@pytest.mark.parametrize("row", ["7\t0 3\t1", "7\t0\t3", "\t0\t1", "7\t\t1", "7\t0 y\t1", "7\t0"])
def test_a_bad_row_is_named(tmp_path: Path, row: str) -> None:
    write(tmp_path, ROWS | {"valid": ["9\t2 0\t1", row]})
    with pytest.raises(DataError, match=r"Tiny_Set\.valid\.inter line 3"):
        load(tmp_path, tmp_path / "out")


def test_other_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"exactly one NAME\.train\.inter, found none"):
        load(tmp_path, tmp_path / "out")
    write(tmp_path, header="user\titems\titem")
    with pytest.raises(DataError, match=r"expected .*user_id:token"):
        load(tmp_path, tmp_path / "out")
    write(tmp_path)
    (tmp_path / "Tiny_Set.item.json").write_text(json.dumps({"0": {"title": "a"}, "2": {"title": "b"}}))
    with pytest.raises(DataError, match=r"keys 0\.\.1 for its 2 items; '1' missing, '2' not among them"):
        load(tmp_path, tmp_path / "out")
    (tmp_path / "Tiny_Set.test.inter").unlink()
    with pytest.raises(DataError, match=r"lacks Tiny_Set\.test\.inter"):
        load(tmp_path, tmp_path / "out")
    write(tmp_path, name="Other")
    with pytest.raises(DataError, match="found Other, Tiny_Set"):
        load(tmp_path, tmp_path / "out")


def test_users_and_items_may_be_text(tmp_path: Path) -> None:
    write(tmp_path, {"train": ["bob\tx\ty", "al\tz\tx"], "valid": ["bob\tx y\tz"], "test": ["al\tz x\ty"]})
    entries = {name: {"title": f"Title &amp; {name}"} for name in ("z", "x", "y")}
    (tmp_path / "Tiny_Set.item.json").write_text(json.dumps(entries))
    dataset = load(tmp_path, tmp_path / "out")
    assert dataset.items.external_ids == ["x", "y", "z"]
    assert dataset.items.titles == ["Title &amp; x", "Title &amp; y", "Title &amp; z"]  # as they are, unless a key says
    assert dataset.user_ids(dataset.train.user_N) == ["bob", "al"]
    assert dataset.valid.history[0].tolist() == [0, 1]
    keys = PrepareConfig(decode_entities=True)
    out = prepare("inter", tmp_path, tmp_path / "decoded", prepare=keys, data=DataConfig(), seed=0)
    assert load_dataset(out).items.titles == ["Title & x", "Title & y", "Title & z"]


def test_numbers_of_users_stay_and_are_their_ids(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = load(tmp_path, tmp_path / "out")
    assert dataset.train.user_N.tolist() == [7, 7, 9]
    assert dataset.user_ids(dataset.train.user_N) == ["7", "7", "9"]


def test_without_an_item_file_the_ids_are_titles(tmp_path: Path) -> None:
    write(tmp_path, {"train": ["7\t10\t9", "7\t10 9\t8"], "valid": ["7\t10\t9"], "test": ["7\t10\t8"]})
    (tmp_path / "Tiny_Set.item.json").unlink()
    dataset = load(tmp_path, tmp_path / "out")
    assert dataset.items.external_ids == dataset.items.titles == ["8", "9", "10"]
    assert not dataset.has_titles


def test_a_reserved_token_in_a_ready_made_title_is_named_or_escaped(tmp_path: Path) -> None:
    write(tmp_path)
    entries = {str(n): {"title": f"Item {n}"} for n in range(3)} | {"1": {"title": "a <|endoftext|> b"}}
    (tmp_path / "Tiny_Set.item.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"1 item such as 1 \('a <\|endoftext\|> b'\).*prepare\.reserved_tokens=escape"):
        load(tmp_path, tmp_path / "out")
    keys = PrepareConfig(reserved_tokens="escape")
    out = prepare("inter", tmp_path, tmp_path / "out", prepare=keys, data=DataConfig(), seed=0)
    assert load_dataset(out).items.titles[1] == "a < |endoftext|> b"
    (tmp_path / "Tiny_Set.item.json").write_text(json.dumps(entries | {"1": {"title": "x" * 3000}}))
    with pytest.raises(DataError, match=r"item such as 1 \('x+\.\.\. \(3,000 characters\).*prepare\.max_title_chars"):
        load(tmp_path, tmp_path / "out")


@pytest.mark.real_data
def test_industrial(industrial: Path, tmp_path: Path) -> None:
    """The counts of the public split, and that its windows are ours: no sample breaks its user's sequence."""
    dataset = load(industrial, tmp_path / "out")
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (36_259, 4_532, 4_533)
    assert len(dataset.items) == 3_686
    statistics = dataset.manifest["statistics"]
    assert statistics["users"] == 7_694
    seen = set(dataset.train.target_N.tolist())
    assert len(set(dataset.test.target_N.tolist()) - seen - set(dataset.train.history.flat.tolist())) == 37
    assert statistics["unseen_targets"]["test"] == 37
    assert dataset.manifest["leak_check"]["broken_windows"] == 0
    assert dataset.train.history.lengths.max() == 10
    assert dataset.items.titles[0].startswith("SUPCO SPP6 Relay/Capacitor Hard Start Kit")
    assert sum(name.endswith(".json") for name in dataset.manifest["files"]) == 2
