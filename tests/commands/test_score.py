"""``tawin-nemo score``: lists of another program beside the stages of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tawin_nemo.data.interactions import load_dataset
from tests.train.runs import SMALL, called, run


@pytest.fixture
def lists(small_dataset: Path, finished_run: Path, tmp_path: Path) -> Path:
    """Lists that have each target where stage rl has it."""
    table = pl.read_parquet(finished_run / "rl/eval/test.per_user.parquet")
    names = load_dataset(small_dataset).items.external_ids
    lines = []
    for row, target, rank in table.select("row", "target", "rank").rows():
        others = [name for name in names[:8] if name != names[target]]
        items = others[:6] if rank < 0 else [*others[:rank], names[target]]
        lines += [{"row": row, "item_id": item, "score": -float(place)} for place, item in enumerate(items)]
    path = tmp_path / "theirs.csv"
    pl.DataFrame(lines).write_csv(path)
    return path


def arguments(small_dataset: Path, run_dir: Path, lists: Path, *more: str) -> tuple[str, ...]:
    return (*SMALL, f"data.root={small_dataset}", f"run_dir={run_dir}", f"score.lists={lists}", *more)


def test_lists_that_equal_a_stage_have_its_metrics(small_dataset, finished_run, lists, tmp_path) -> None:
    against = f"score.against={finished_run}/rl"
    result: dict[str, Any] = run(*arguments(small_dataset, tmp_path, lists, against), verb="score")
    theirs = pl.read_parquet(finished_run / "rl/eval/test.per_user.parquet")
    assert (theirs["sharing"] == 1).all()  # else a hit of the stage would count less than one of an item
    assert result["rows_without_list"] == result["rows"] - theirs.height
    found = pl.read_parquet(tmp_path / "theirs/eval/test.per_user.parquet")
    joined = found.join(theirs, on="row")
    assert joined.height == theirs.height
    assert (joined["rank"] == joined["rank_right"]).all()
    assert joined["user_id"].to_list() == joined["user_id_right"].to_list()
    for pair in result["minus"].values():
        assert pair["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert json.loads((tmp_path / "theirs/eval/test.json").read_text())["means"] == {
        name: value for name, value in result["test"].items() if name != "intervals"
    }


def test_mistakes(small_dataset, finished_run, lists, tmp_path) -> None:
    for more, message in (
        (("score.lists=",), "score.lists='' is no file"),
        ((f"score.against={tmp_path}",), "has no folder eval; name a finished stage"),
    ):
        done = called(*arguments(small_dataset, tmp_path, lists, *more), verb="score")
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
