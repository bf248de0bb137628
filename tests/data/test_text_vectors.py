"""Item vectors: every unusable file is named, titles with common words lie together, equal input gives equal output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tawin_nemo.data.text_vectors import load_item_vectors, text_vectors
from tawin_nemo.util.errors import DataError

IDS = ["a", "b", "c", "d", "e"]


def test_a_good_file_is_read_as_float32(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3))
    np.save(tmp_path / "items.npy", rows)
    found = load_item_vectors(tmp_path / "items.npy", IDS)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, rows.astype(np.float32))
    np.save(tmp_path / "counts.npy", np.eye(5, dtype=np.int32))
    assert load_item_vectors(tmp_path / "counts.npy", IDS).tolist() == np.eye(5).tolist()


def test_rows_are_found_by_the_ids_of_their_items(tmp_path: Path) -> None:
    """A file of another state of the catalog: one item left and one came, so no row stands at its item's number."""
    rows = np.arange(1, 13, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "items.npy", rows)
    (tmp_path / "items.json").write_text(json.dumps(["0", "b", "e", "d", "a", "c"]))
    np.testing.assert_array_equal(load_item_vectors(tmp_path / "items.npy", IDS), rows[[4, 1, 5, 3, 2]])
    with pytest.raises(DataError, match=r"rl.reward_source=.*no row for 1 items of the catalog: 'new'"):
        load_item_vectors(tmp_path / "items.npy", ["a", "new"])
    (tmp_path / "items.json").write_text(json.dumps(["a"]))
    with pytest.raises(DataError, match=r"names 1 items, but .* has 6 rows"):
        load_item_vectors(tmp_path / "items.npy", IDS)


def wrong(name: str, rows: np.ndarray) -> np.ndarray:
    rows = rows.copy()
    if name == "nan":
        rows[3, 1] = np.nan
    elif name == "infinite":
        rows[2] = np.inf
    elif name == "zero":
        rows[4] = 0
    elif name == "rows":
        rows = rows[:4]
    elif name == "flat":
        rows = rows[:, 0]
    elif name == "text":
        rows = rows.astype(str)
    return rows


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "1 rows are not finite .items 3."),
        ("infinite", "1 rows are not finite .items 2."),
        ("zero", "1 rows are all zero .items 4."),
        ("rows", "4 rows and the catalog 5 items"),
        ("flat", r"shape \(5,\)"),
        ("text", "array of numbers"),
    ],
)
def test_unusable_arrays_are_named(tmp_path: Path, name: str, message: str) -> None:
    np.save(tmp_path / "items.npy", wrong(name, np.random.default_rng(0).normal(size=(5, 3))))
    with pytest.raises(DataError, match=rf"rl\.reward_source=.*{message}"):
        load_item_vectors(tmp_path / "items.npy", IDS)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rl\.reward_source=.*no such file"):
        load_item_vectors(tmp_path / "absent.npy", IDS)
    (tmp_path / "broken.npy").write_bytes(b"not an array")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    for name in ("broken", "empty", "objects"):
        with pytest.raises(DataError, match=rf"{name}.*cannot be read as \.npy"):
            load_item_vectors(tmp_path / f"{name}.npy", IDS)
    np.savez(tmp_path / "archive.npz", a=np.eye(5))
    with pytest.raises(DataError, match=r"archive"):
        load_item_vectors(tmp_path / "archive.npz", IDS)


KINDS = ("steel hex bolt", "nitrile glove box", "digital caliper tool", "safety goggle clear")


def titles() -> list[str]:
    """40 titles of four kinds, kind i at the places i, i + 4, ..."""
    rng = np.random.default_rng(1)
    brands = ["Acme", "Bolton", "Cortex", "Delta"]
    return [f"{brands[rng.integers(4)]} {KINDS[i % 4]} {rng.integers(1, 9)} mm" for i in range(40)]


def test_titles_of_a_kind_lie_together() -> None:
    vectors = text_vectors(titles(), dims=8)
    assert vectors.shape == (40, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosine = vectors @ vectors.T
    same = np.arange(40)[:, None] % 4 == np.arange(40) % 4
    np.fill_diagonal(cosine, np.nan)
    assert np.nanmin(cosine[same]) > np.nanmax(cosine[~same])


def test_seeded_small_and_wordless() -> None:
    first = text_vectors(titles(), dims=8, seed=3)
    np.testing.assert_array_equal(first, text_vectors(titles(), dims=8, seed=3))
    few = text_vectors(["Bolt", "bolt", "glove"])
    assert few.shape == (3, 2)  # no more dimensions than words
    assert few[0] @ few[1] == pytest.approx(1)
    assert few[0] @ few[2] == pytest.approx(0, abs=1e-6)
    assert text_vectors(["bolt", "-- !", "glove"])[1].tolist() == [0, 0]
    with pytest.raises(DataError, match=r"none of the 2 item texts has a word"):
        text_vectors(["--", "!"])


@pytest.mark.real_data
def test_real_titles_resemble_what_the_user_had_before(industrial: Path) -> None:
    name = "Industrial_and_Scientific"
    items = json.loads((industrial / f"{name}.item.json").read_text(encoding="utf-8"))
    vectors = text_vectors([items[str(i)]["title"] for i in range(len(items))])
    lines = (industrial / f"{name}.valid.inter").read_text(encoding="utf-8").splitlines()[1:]
    last, target = np.array([(int(h.split()[-1]), int(t)) for _, h, t in (line.split("\t") for line in lines)]).T
    other = np.random.default_rng(0).permutation(target)
    near, far = (vectors[last] * vectors[target]).sum(1).mean(), (vectors[last] * vectors[other]).sum(1).mean()
    assert vectors.any(axis=1).all()
    assert near > 2 * far > 0
