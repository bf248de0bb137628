"""Run files: the ranks survive, the means can be made again, damage is found."""

import base64
import json
import zlib
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tawin_nemo.tools.study.record import (
    FailedRun,
    ParentRun,
    RunRecord,
    final_stage,
    read_folder,
    read_stage,
    unpack,
)
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import sha256
from tests.tools.study.files import KS, evaluation, some_ranks, write_run


def pack(values_B: np.ndarray) -> str:
    """Ranks as run files held them before there were .npz files."""
    return f"i2:{base64.b64encode(zlib.compress(values_B.astype('<i2').tobytes())).decode()}"


@given(st.lists(st.integers(-1, 2**15 - 1), max_size=50))
def test_ranks_of_older_files_are_read(values):
    ranks_B = unpack(pack(np.array(values, dtype=np.int64)))
    assert ranks_B.tolist() == values
    assert ranks_B.dtype == np.int64


def test_a_run_file_of_an_older_version_is_the_same_record(tmp_path):
    sharing = np.where(np.arange(200) % 7 == 0, 3, 1)
    path = tmp_path / "a.seed3.json"
    first = record(tmp_path, sharing=sharing)
    first.write(path)
    content = json.loads(path.read_text())
    content["splits"]["valid"] |= {"rank": pack(some_ranks("valid")), "sharing": pack(sharing)}
    content["splits"]["test"] |= {"rank": pack(some_ranks("test")), "sharing": None}
    content["splits"]["test"]["means"] = {"recall@3": float((some_ranks("test") % 1000 < 3).mean())}
    path.write_text(json.dumps(content))
    path.with_suffix(".npz").unlink()
    second = RunRecord.read(path)
    assert second.splits["valid"].rank_B.tolist() == first.splits["valid"].rank_B.tolist()
    assert second.splits["valid"].sharing_B.tolist() == sharing.tolist()
    assert second.splits["test"].sharing_B is None


def test_equal_runs_give_equal_files_of_a_few_thousand_bytes(tmp_path):
    rng = np.random.default_rng(0)
    ranks = np.where(rng.random(4533) < 0.22, rng.integers(0, 20, 4533), -1)
    write_run(tmp_path / "run", "rl", {"test": evaluation(ranks)})
    first = replace(record(tmp_path / "other"), **read_stage(tmp_path / "run" / "rl", ["test"]))
    first.write(tmp_path / "a.seed1.json")
    first.write(tmp_path / "b.seed1.json")
    assert (tmp_path / "a.seed1.npz").read_bytes() == (tmp_path / "b.seed1.npz").read_bytes()
    assert (tmp_path / "a.seed1.npz").stat().st_size < 4000


@pytest.mark.parametrize("damage", [None, b"", b"PK"])
def test_ranks_that_are_absent_or_damaged_are_named(tmp_path, damage):
    path = tmp_path / "a.seed3.json"
    record(tmp_path).write(path)
    path.with_suffix(".npz").unlink() if damage is None else path.with_suffix(".npz").write_bytes(damage)
    with pytest.raises(DataError, match=r"a\.seed3\.json is not a run file.*delete it"):
        RunRecord.read(path)


@pytest.mark.parametrize("text", ["", "i2:%%%", "i8:eJwDAAAAAAE=", "i2:AAAA"])
def test_damaged_numbers_are_refused(text):
    with pytest.raises((ValueError, zlib.error)):
        unpack(text)


def record(tmp_path, *, sharing=None) -> RunRecord:
    splits = {name: evaluation(some_ranks(name), sharing) for name in ("valid", "test")}
    write_run(tmp_path / "run", "rl", splits)
    return RunRecord(
        study="s", arm="a[x=1]", seed=3, command="python -m tawin_nemo train", commit="abc", date="2026-01-01",
        process_s=40.0, hardware={"cpu": "c", "cores": 2}, recipe_hash="h", settings={"rl.lr": 1e-5, "eval.ks": [1, 3]},
        parent=ParentRun("s/sft.seed3", "p"), **read_stage(tmp_path / "run" / "rl", ["valid", "test"]),
    )  # fmt: skip


def test_a_stage_directory_becomes_a_record(tmp_path):
    found = record(tmp_path)
    assert (found.stage, found.steps, found.chosen_step, found.wall_s) == ("rl", 2, 2, 30.0)
    assert found.curves == {"valid/loss": [[0, 3.0], [2, 1.5]]}
    assert found.training == {"train/loss": 1.5}
    assert found.trends == {"train/loss": [2.0, 1.0]}
    split = found.splits["test"]
    assert split.rank_B.tolist() == some_ranks("test").tolist()
    assert split.sharing_B is None
    assert split.facts == {"collisions": 0, "coverage": 0.5, "short_rows": 0.0}
    assert split.per_user_sha256 == sha256(tmp_path / "run" / "rl" / "eval" / "test.per_user.parquet")
    assert split.rows_sha256 == found.splits["valid"].rows_sha256  # the same users and targets
    assert final_stage(tmp_path / "run") == tmp_path / "run" / "rl"
    (tmp_path / "run" / "rl" / "done.json").unlink()
    assert final_stage(tmp_path / "run") is None
    assert final_stage(tmp_path) is None


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_written_is_read(tmp_path, shared):
    sharing = np.where(np.arange(200) % 7 == 0, 3, 1) if shared else None
    first = record(tmp_path, sharing=sharing)
    first.write(tmp_path / "r" / "a.seed3.json")
    second = RunRecord.read(tmp_path / "r" / "a.seed3.json")
    for name in ("study", "arm", "seed", "settings", "parent", "curves", "training", "trends", "hardware", "wall_s"):
        assert getattr(second, name) == getattr(first, name)
    for name, split in first.splits.items():
        again = second.splits[name]
        assert again.rank_B.tolist() == split.rank_B.tolist()
        assert (again.sharing_B is None) is not shared
        for k in KS:  # the run's own evaluation and the run file give the same means
            assert again.values(f"recall@{k}").mean() == pytest.approx(again.means[f"recall@{k}"], abs=1e-12)
    finished, failed = read_folder(tmp_path / "r")
    assert list(finished) == [("a[x=1]", 3)]
    assert failed == {}


def test_values_that_no_rank_gives_are_kept_row_by_row(tmp_path):
    """Candidate figures of all rows can be paired; areas of some rows cannot, so they stay a mean."""
    found = record(tmp_path)
    table, folder = (
        pl.DataFrame({"row": np.arange(200), "hit_ratio@1": np.arange(200) % 3 / 3}),
        tmp_path / "run/rl/eval",
    )
    table.write_parquet(folder / "test.candidates.parquet")
    table.rename({"hit_ratio@1": "auc"}).head(50).write_parquet(folder / "test.auc.parquet")
    first = replace(found, **read_stage(tmp_path / "run" / "rl", ["valid", "test"]))
    first.write(tmp_path / "r" / "a.seed3.json")
    split = RunRecord.read(tmp_path / "r" / "a.seed3.json").splits["test"]
    np.testing.assert_array_equal(split.values("hit_ratio@1"), table["hit_ratio@1"].to_numpy())
    for metric in ("auc", "valid_ratio"):
        with pytest.raises(
            DataError, match=f"{metric} was not measured; set eval.candidates, eval.grounding or eval.auc"
        ):
            split.values(metric)


def test_hits_on_shared_paths_count_as_the_evaluation_says(tmp_path):
    sharing = np.full(200, 4)
    split = record(tmp_path, sharing=sharing).splits["valid"]
    assert split.values("recall@3").max() == 0.25
    assert replace(split, collision="optimistic").values("recall@3").max() == 1.0
    assert split.shares_credit
    assert split.matches("recall@3").max() == 1.0  # as MiniOneRec counts


def test_a_cut_off_beyond_the_list_is_refused(tmp_path):
    split = record(tmp_path).splits["valid"]
    with pytest.raises(DataError, match=r"recall@50 needs .*eval\.beams was 20"):
        split.values("recall@50")


def test_means_that_the_ranks_do_not_give_are_found(tmp_path):
    path = tmp_path / "a.seed3.json"
    record(tmp_path).write(path)
    content = json.loads(path.read_text())
    content["splits"]["test"]["means"]["recall@3"] += 0.001
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"test recall@3 .* is not what its 200 ranks give"):
        RunRecord.read(path)


@pytest.mark.parametrize("damage", ["{", "[]", '{"study": "x"}', '{"parent": null, "splits": {}}'])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "a.seed3.json"
    path.write_text(damage)
    with pytest.raises(DataError, match=r"a\.seed3\.json is not a run file.*delete it"):
        RunRecord.read(path)


def test_a_failed_run_is_listed_until_it_succeeds(tmp_path):
    lost = FailedRun("s", "a[x=1]", 3, "python", "abc", "2026-01-01", 2, ["boom"])
    lost.write(tmp_path / "r" / "a.x=1.seed3.failed.json")
    assert read_folder(tmp_path / "r") == ({}, {("a[x=1]", 3): lost})
    record(tmp_path).write(tmp_path / "r" / "a.x=1.seed3.json")
    finished, failed = read_folder(tmp_path / "r")
    assert (list(finished), failed) == ([("a[x=1]", 3)], {})


def test_without_shared_paths_there_is_no_other_count(tmp_path):
    split = record(tmp_path).splits["valid"]
    assert not split.shares_credit
    assert split.matches("ndcg@3").tolist() == split.values("ndcg@3").tolist()
