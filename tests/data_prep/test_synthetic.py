from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import Dataset, load_dataset
from tawin_nemo.data_prep import synthetic
from tawin_nemo.data_prep.prepare import prepare
from tawin_nemo.data_prep.synthetic_catalog import make_catalog

SEED = 3
DEFAULTS = PrepareConfig()
SIZE = (DEFAULTS.synthetic_items, DEFAULTS.synthetic_users, DEFAULTS.synthetic_reviews_per_user)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("synthetic") / "out"
    windowed = replace(DEFAULTS, start="2016-10", end="2018-11")
    return load_dataset(prepare("synthetic", Path(), out, prepare=windowed, data=DataConfig(), seed=SEED))


def test_default_size(dataset: Dataset) -> None:
    assert len(dataset.items) > 1000
    assert len(dataset.train) > 20_000
    assert 1000 < len(dataset.test) < 8000


def test_oracle_leaves_room_and_gives_signal(dataset: Dataset) -> None:
    world = synthetic.make_world(*SIZE, SEED)
    item_of = {asin: item for item, asin in enumerate(world.asins)}
    world_item_I = np.array([item_of[asin] for asin in dataset.items.external_ids])
    test = dataset.test
    last = world_item_I[test.history.flat[test.history.offsets[1:] - 1]]
    hit_NK = synthetic.oracle_ranking(world, last, 10) == world_item_I[test.target_N][:, None]
    recall_K = np.cumsum(hit_NK.mean(axis=0))
    assert 0.25 < recall_K[0] < 0.35
    assert 0.6 < recall_K[9] < 0.75
    popular = np.argsort(-np.bincount(dataset.train.target_N))[:10]
    assert np.isin(test.target_N, popular).mean() < 0.1


def test_titles(dataset: Dataset) -> None:
    words = [title.split() for title in dataset.items.titles]
    assert 5 <= np.mean([len(title) for title in words]) <= 8
    assert len({word for title in words for word in title}) < 250
    duplicates = len(words) - len(set(dataset.items.titles))
    assert 0 < duplicates < 30
    catalog = make_catalog(5000, np.random.default_rng(0))
    assert len(set(catalog.titles)) == 5000


def test_every_kind_of_dirt_is_met(dataset: Dataset) -> None:
    problems = dataset.manifest["problems"]
    assert set(problems["refused_items"]) == {"empty title", "markup in title", "no metadata", "title too long"}
    assert set(problems[synthetic.REVIEWS_FILE]["reasons"]) == {
        "not valid JSON",
        "not a JSON object",
        "missing field reviewerID",
        "missing field unixReviewTime",
        "wrong type of field unixReviewTime",
    }
    left = [step["interactions"] for step in dataset.manifest["steps"]]
    assert left == sorted(left, reverse=True)
    assert len(set(left)) == len(left)


@pytest.mark.parametrize("items", [50, 240, 300])
def test_successors_are_other_items(items: int) -> None:
    catalog = make_catalog(items, np.random.default_rng(items))
    own = np.arange(items)[:, None]
    assert ((catalog.successors_IS >= 0) & (catalog.successors_IS < items) & (catalog.successors_IS != own)).all()
    assert catalog.popularity_I.sum() == pytest.approx(1.0)


def test_first_successor_is_of_the_same_brand_and_another_family() -> None:
    catalog = make_catalog(480, np.random.default_rng(1))  # two full categories: no missing slots
    first = catalog.successors_IS[:, 0]
    assert (catalog.brand_I[first] == catalog.brand_I).all()
    assert (catalog.family_I[first] != catalog.family_I).all()


def test_raw_files_depend_on_the_seed_only(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        synthetic.write_raw(folder, 60, 80, 6.0, seed)
    for name in (synthetic.REVIEWS_FILE, synthetic.METADATA_FILE):
        one, two, other = ((folder / name).read_bytes() for folder in folders)
        assert one == two
        assert one != other
        assert gzip.decompress(one).count(b"\n") > 60
