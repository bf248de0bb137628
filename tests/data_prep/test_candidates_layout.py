"""S-DPO's JSON with candidate sets: generated files, errors that name file, row and key, and the published LastFM."""

import json

import numpy as np
import pytest

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import load_dataset
from tawin_nemo.data_prep.prepare import detect, prepare
from tawin_nemo.util.errors import DataError

NAMES = [f"Artist {letter}" for letter in "ABCDEFGHIJKLMNOPQRST"]


def rows_of(user: int, joined: bool = True) -> list[dict[str, object]]:
    """Three rows of one user, each history continuing the one before."""
    draw = np.random.default_rng(user)
    listened = [NAMES[i] for i in draw.permutation(len(NAMES))[:6]]
    rows = []
    for length in (3, 4, 5):
        target = listened[length]
        others = [name for name in NAMES if name not in listened]
        history = listened[:length]
        candidates = [*draw.permutation(others)[:4].tolist(), target]
        rows.append(
            {
                "historyList": "::".join(history) if joined else history,
                "itemList": draw.permutation(candidates).tolist(),
                "trueSelection": target,
            }
        )
    return rows


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "toy-val.json", [row for user in range(10) for row in rows_of(user)])
    write(tmp_path / "toy-test.json", [row for user in range(10, 13) for row in rows_of(user, joined=False)])
    return tmp_path


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")


def toy_folder(directory):
    """The files of 20 users to train on and of 6 others to test on; the folder."""
    write(directory / "toy-val.json", [row for user in range(20) for row in rows_of(user)])
    write(directory / "toy-test.json", [row for user in range(30, 36) for row in rows_of(user)])
    return directory


def prepared(root, out, max_history=10):
    return load_dataset(
        prepare("auto", root, out, prepare=PrepareConfig(), data=DataConfig(max_history=max_history), seed=0)
    )


def test_rows_come_back_with_their_candidates(folder, tmp_path):
    assert detect(folder) == "candidates"
    dataset = prepared(folder, tmp_path / "out", max_history=4)
    assert dataset.items.titles == NAMES
    source = {
        "train": [row for user in range(9) for row in rows_of(user)],
        "valid": rows_of(9),
        "test": [row for user in range(10, 13) for row in rows_of(user)],
    }
    for name, rows in source.items():
        split = getattr(dataset, name)
        assert len(split) == len(rows)
        for number, row in enumerate(rows):
            assert [NAMES[item] for item in split.history[number]] == row["historyList"].split("::")[-4:]
            assert NAMES[split.target_N[number]] == row["trueSelection"]
            assert [NAMES[item] for item in split.candidates[number]] == row["itemList"]
        assert np.array_equal(split.user_N - split.user_N[0], np.repeat(np.arange(len(rows) // 3), 3))
    users = [set(getattr(dataset, name).user_N.tolist()) for name in source]
    assert not users[0] & users[1]
    assert not users[0] & users[2]
    assert not users[1] & users[2]
    part = dataset.train.slice(2, 5)
    assert [part.candidates[n].tolist() for n in range(3)] == [dataset.train.candidates[n].tolist() for n in (2, 3, 4)]


def test_a_train_file_is_train(folder, tmp_path):
    write(folder / "toy-train.json", [row for user in range(20, 24) for row in rows_of(user)])
    dataset = prepared(folder, tmp_path / "out")
    assert [len(getattr(dataset, name)) for name in ("train", "valid", "test")] == [12, 30, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trueSelection": "Artist Z"}, "row 1: trueSelection 'Artist Z' is not in itemList"),
        ({"itemList": ["Artist A", "Artist A"], "trueSelection": "Artist A"}, "row 1: itemList holds 'Artist A' twice"),
        ({"historyList": ""}, "row 1: historyList must hold item names"),
        ({"itemList": 7}, "row 1: itemList must hold item names, not '7'"),
        ({"itemList": ["Artist A"], "trueSelection": "Artist A"}, "test row 1 has 1 candidates, others 5"),
    ],
)
def test_bad_rows_are_named(folder, tmp_path, change, message):
    rows = [row for user in range(10, 13) for row in rows_of(user)]
    write(folder / "toy-test.json", [rows[0], rows[1] | change, *rows[2:]])
    with pytest.raises(DataError, match=message):
        prepared(folder, tmp_path / "out")


def test_other_files_are_refused(folder, tmp_path):
    (folder / "toy-test.json").write_text('{"historyList": 1}', encoding="utf-8")
    with pytest.raises(DataError, match=r"toy-test.json must be a list of at least one object"):
        prepared(folder, tmp_path / "out")
    write(folder / "toy-test.json", [{"historyList": "a"}])
    with pytest.raises(DataError, match=r"row 0 must be an object with the keys historyList, itemList, trueSelection"):
        prepared(folder, tmp_path / "out")
    write(folder / "more-test.json", rows_of(1))
    with pytest.raises(DataError, match=r"one file \*-test.json, found more-test.json, toy-test.json"):
        prepared(folder, tmp_path / "out")


@pytest.mark.real_data
def test_the_published_lastfm(shared_data, tmp_path):
    root = shared_data / "data" / "lastfm_candidates"
    if not root.is_dir():
        pytest.skip("no data/lastfm_candidates")
    dataset = prepared(root, tmp_path / "out")
    assert len(dataset.items) == 4606  # as NAPO's paper says
    assert len(dataset.train) + len(dataset.valid) == 2767
    assert len(dataset.test) == 2495
    for split in (dataset.train, dataset.valid, dataset.test):
        assert set(split.candidates.lengths.tolist()) == {20}
        assert all(split.target_N[n] in split.candidates[n] for n in range(len(split)))
    assert 100 <= len(np.unique(dataset.test.user_N)) <= 150  # about 122 users
