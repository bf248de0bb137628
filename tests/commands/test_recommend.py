"""``tawin-nemo recommend``: the items of the search, whole parts whatever happens, and errors before any work."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from tawin_nemo.commands.recommend_job import check_counts, shard_of
from tawin_nemo.config.schema import RecommendConfig
from tawin_nemo.data.history_checks import HistoryCounts
from tawin_nemo.data.interactions import load_dataset
from tawin_nemo.util.errors import ConfigError, DataError
from tawin_nemo.util.launch import read_array_task
from tests import failpoints
from tests.train.runs import called, run

USERS = 70


@pytest.fixture
def histories(small_dataset: Path, tmp_path: Path) -> Path:
    """70 users with one to six items."""
    names = load_dataset(small_dataset).items.external_ids
    draw = np.random.default_rng(5)
    lists = [draw.choice(names, size=1 + number % 6, replace=False).tolist() for number in range(USERS)]
    frame = pl.DataFrame({"user_id": [f"user {number}" for number in range(USERS)], "item_ids": lists})
    (tmp_path / "users").mkdir()
    frame.head(30).write_parquet(tmp_path / "users" / "a.parquet")
    frame.tail(40).write_parquet(tmp_path / "users" / "b.parquet")
    return tmp_path / "users"


def words(run_dir: Path, output: Path, *more: str) -> tuple[str, ...]:
    return (f"checkpoint={run_dir / 'rl'}", f"recommend.output={output}", "recommend.n=5", *more)


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_lists_are_those_of_the_search_and_can_be_scored(finished_run: Path, small_dataset: Path, tmp_path: Path):
    """Items and scores of `generate`, which is one call of the engine; metrics of the stage, through `score`."""
    out = tmp_path / "lists"
    result: dict[str, Any] = run(*words(finished_run, out, "recommend.split=test"), verb="recommend")
    assert (result["rows"], result["parts"], result["parts_made"], result["complete"]) == (24, 1, 1, True)
    rows = f"checkpoint={finished_run / 'rl'}", "generate.split=test", "generate.rows=24", "generate.n=5"
    expected = run(*rows, verb="generate")["recommendations"]
    table = pq.read_table(out).to_pylist()
    assert [line["item_ids"] for line in table] == [[item["external_id"] for item in e["items"]] for e in expected]
    assert [line["scores"] for line in table] == [[item["score"] for item in e["items"]] for e in expected]
    assert [line["row"] for line in table] == list(range(24))
    assert all(line["user_id"] for line in table)
    scored = run(
        f"checkpoint={finished_run / 'rl'}", f"score.lists={out}", f"run_dir={tmp_path}", f"data.root={small_dataset}",
        "data.dataset=prepared", "eval.ks=[1,3]", verb="score",
    )  # fmt: skip
    theirs = pl.read_parquet(finished_run / "rl/eval/test.per_user.parquet")
    assert (theirs["sharing"] == 1).all()
    ours = pl.read_parquet(tmp_path / "lists/eval/test.per_user.parquet").join(theirs, on="row")
    assert ours.height == 24 == scored["rows"] - scored["rows_without_list"]
    assert ours["recall@3"].to_list() == ours["recall@3_right"].to_list()


@pytest.mark.distributed
def test_three_kills_and_another_number_of_ranks_leave_the_same_bytes(
    finished_run: Path, histories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more = f"recommend.histories={histories}", "recommend.part_rows=16", "recommend.exclude_history=true"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*words(finished_run, whole, *more), verb="recommend")["parts_made"] == 5
    lists, kept = pq.read_table(whole).to_pylist(), []
    seen = pl.read_parquet(histories / "*.parquet").rows_by_key("user_id")
    assert [line["user_id"] for line in lists] == [f"user {number}" for number in range(USERS)]
    assert not any(set(line["item_ids"]) & set(seen[line["user_id"]][0][0]) for line in lists)
    for rule in ("file.before_rename=kill@5", "file.before_rename=kill@3", "file.before_rename=kill"):
        monkeypatch.setenv(failpoints.VARIABLE, rule)
        assert called(*words(finished_run, killed, *more), verb="recommend").returncode == -9
        kept.append(len(list(killed.glob("part-*.parquet"))))
    monkeypatch.delenv(failpoints.VARIABLE)
    assert kept == [1, 2, 2]
    ended = run(*words(finished_run, killed, *more, "trainer.devices=2"), verb="recommend")
    assert ended["complete"]
    assert ended["parts_made"] == 3
    assert files(killed) == files(whole)


def test_a_dry_run_checks_and_another_job_is_refused(finished_run: Path, histories: Path, tmp_path: Path):
    out, given = tmp_path / "lists", f"recommend.histories={histories}"
    arguments = words(finished_run, out, given, "recommend.part_rows=30")
    planned = run(*arguments, "--dry-run", verb="recommend")
    assert (planned["dry_run"], planned["rows"], planned["parts"], planned["parts_to_do"]) == (True, USERS, 3, 3)
    assert not out.exists()
    shares = [f"recommend.shard_index={index}" for index in (0, 1)]
    first = run(*arguments, shares[0], "recommend.shard_count=2", verb="recommend")
    assert (first["parts_made"], first["rows_made"], first["complete"]) == (1, 30, False)
    last = run(*arguments, shares[1], "recommend.shard_count=2", verb="recommend")
    assert (last["parts_made"], last["rows_made"], last["complete"]) == (2, 40, True)
    assert len(pq.read_table(out)) == USERS
    for changed, message in (
        ((f"checkpoint={finished_run / 'sft'}",), "results of another job (checkpoint: "),
        (("recommend.n=4", "recommend.min_score=-9"), "recommend.min_score: 0.0 -> -9.0; recommend.n: 5 -> 4)"),
    ):
        done = called(*arguments, *changed, verb="recommend")
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    job = json.loads((out / "_job.json").read_text())
    (out / "_job.json").write_text(json.dumps(job | {"catalog": "0" * 64}))
    done = called(*arguments, verb="recommend")
    assert (done.returncode, "another job (catalog: 000000000000.. -> " in done.stderr) == (2, True)
    (out / "_job.json").write_text(json.dumps(job))
    frame = pl.read_parquet(histories / "a.parquet")
    lists = frame["item_ids"].to_list()
    frame.with_columns(pl.Series("item_ids", [lists[1], *lists[1:]])).write_parquet(histories / "a.parquet")
    done = called(*arguments, verb="recommend")
    assert done.returncode == 2
    assert "recommend.histories: rows 0 .. 29 are not those that" in done.stderr


def test_filters_policies_and_fields(finished_run: Path, small_dataset: Path, tmp_path: Path):
    """One run: allowed and forbidden items, a field, skipped unknown items, and users that get an empty list."""
    items = pl.read_parquet(small_dataset / "items.parquet")
    names, brand = items["external_id"].to_list(), items["brand"].mode().sort()[0]
    (tmp_path / "allow.txt").write_text("\n".join(names[:100]))
    pl.DataFrame({"item_id": names[50:60]}).write_parquet(tmp_path / "deny.parquet")
    lists = [[names[0], "gone"], [], ["gone"], names[:3]]
    pl.DataFrame({"user_id": [11, 12, 13, 14], "item_ids": lists}).write_parquet(tmp_path / "in.parquet")
    arguments = words(
        finished_run, tmp_path / "out", f"recommend.histories={tmp_path / 'in.parquet'}",
        f"recommend.allow={tmp_path / 'allow.txt'}", f"recommend.deny={tmp_path / 'deny.parquet'}",
        f"recommend.filter=[brand={brand}]", "recommend.n=150",
    )  # fmt: skip
    done = called(*arguments, "recommend.unknown_items=skip", verb="recommend")
    assert done.returncode == 2
    assert "1 of 4 histories are empty (the first: recommend.histories: row 1 of" in done.stderr
    skip = "recommend.unknown_items=skip", "recommend.empty_histories=skip"
    result = run(*arguments, *skip, verb="recommend")
    assert (result["unknown_items"], result["empty_histories"]) == (2, 2)
    found = pl.read_parquet(tmp_path / "out" / "part-000000.parquet")
    assert found["user_id"].to_list() == [11, 12, 13, 14]
    open_items = set(items.filter(pl.col("brand") == brand)["external_id"]) & {*names[:50], *names[60:100]}
    assert [set(line) for line in found["item_ids"]] == [open_items, set(), set(), open_items]
    done = called(*arguments, *skip, "recommend.filter=[brand=nobody's]", verb="recommend")
    assert done.returncode == 2
    assert 'recommend.filter: no item has brand="nobody\'s"' in done.stderr


def test_what_cannot_be_answered_is_an_error_with_its_key():
    counts = HistoryCounts(9, empty=2, emptied=1, unknown=4, with_unknown=3, unknown_names=["x"], first_empty="row 5")
    with pytest.raises(
        DataError, match=r"4 entries in 3 of 9 histories name no item of the catalog \('x'\).*unknown_it"
    ):
        check_counts(counts, RecommendConfig())
    with pytest.raises(DataError, match=r"2 of 9 histories are empty \(the first: row 5\), 1 have no item of the cat"):
        check_counts(counts, RecommendConfig(unknown_items="skip"))
    check_counts(counts, RecommendConfig(unknown_items="skip", empty_histories="skip"))


@pytest.mark.parametrize(
    ("keys", "array", "expected"),
    [
        ({}, {}, (0, 1)),
        ({"shard_index": 2, "shard_count": 3}, {}, (2, 3)),
        ({}, {"ID": 2, "COUNT": 4, "MIN": 0, "MAX": 3}, (2, 4)),
        ({}, {"ID": 7, "COUNT": 4, "MIN": 1, "MAX": 7, "STEP": 2}, (3, 4)),
        ({"shard_count": 10}, {"ID": 3, "COUNT": 1, "MIN": 3, "MAX": 3}, (3, 10)),  # one task of ten, once more
        ({"shard_index": 1, "shard_count": 10}, {"ID": 3, "COUNT": 1, "MIN": 3, "MAX": 3}, (1, 10)),
        ({"shard_count": 3}, {}, "recommend.shard_count=3 needs recommend.shard_index=0 .. 2"),
        ({"shard_index": 3, "shard_count": 3}, {}, "recommend.shard_index=3 is no share of recommend.shard_count=3"),
        ({"shard_count": 4}, {"ID": 4, "COUNT": 4, "MIN": 1, "MAX": 4}, r"shard_index=4 \(SLURM_ARRAY_TASK_ID\) is"),
        ({}, {"ID": 5, "COUNT": 3, "MIN": 1, "MAX": 9}, "irregular numbers 1 .. 9; set recommend.shard_count"),
    ],
)
def test_the_share_of_a_job(keys: dict[str, int], array: dict[str, int], expected: Any):
    task = read_array_task({f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()})
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            shard_of(RecommendConfig(**keys), task)
    else:
        assert shard_of(RecommendConfig(**keys), task) == expected


def test_a_stop_keeps_the_finished_part_and_the_manifest_has_all(finished_run: Path, histories: Path, tmp_path: Path):
    """``trainer.max_time`` ends the run behind its first part with 75; the next call makes the other one."""
    out = tmp_path / "lists"
    arguments = words(finished_run, out, f"recommend.histories={histories}", "recommend.part_rows=40")
    stopped = called(*arguments, "trainer.max_time=00:00:00:00", verb="recommend")
    assert stopped.returncode == 75, stopped.stderr
    assert "trainer.max_time: finished parts are kept; run the same command again" in stopped.stderr
    assert [path.name for path in out.glob("*.parquet")] == ["part-000000.parquet"]
    ended = run(*arguments, verb="recommend")
    assert (ended["parts_made"], ended["rows_made"], ended["complete"]) == (1, 30, True)
    manifest = json.loads((out / "_manifest.json").read_text())
    assert manifest["rows"] == USERS
    assert {entry["file"]: entry["sha256"] for entry in manifest["parts"]} == {
        name: value for name, value in files(out).items() if name.endswith(".parquet")
    }
