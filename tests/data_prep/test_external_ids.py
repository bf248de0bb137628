"""A table of one's own through the command line: results can be joined with the log by the ids that it has."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from tests.data_prep.formats import USERS, log, samples, shop_items, table
from tests.train.runs import SMALL, called, run

COMMON = [word for word in SMALL if not word.startswith(("data.dataset", "data.train_limit", "data.eval_limit"))]


def write(root: Path, *, items: bool) -> dict[tuple[str, int], str]:
    """The log as CSV; what each user took at each time."""
    table(root / "log.csv", "customer,item_id,when", ((f"00{row.u}", row.i, row.iso) for row in log()))
    if items:
        table(root / "items.csv", "item_id,title", shop_items())
    return {(f"00{row.u}", row.time): row.i for row in log()}


def words(root: Path) -> list[str]:
    own = ["data.dataset=table", f"data.root={root}", "prepare.columns.user=customer", "prepare.columns.time=when"]
    return [*COMMON, *own, f"run_dir={root / 'run'}"]


def check_joined(path: Path, bought: dict[tuple[str, int], str], root: Path) -> pl.DataFrame:
    """Each row of a per-user table names the user and the item of one row of the log."""
    table = pl.read_parquet(path)
    times = pl.read_parquet(root / "run" / "data" / "test.parquet")["time"].to_list()
    assert len(table) == len(times) > 0
    for user, target, time in zip(table["user_id"], table["target_id"], times, strict=True):
        assert bought[user, time] == target
    return table


def test_a_classic_baseline_needs_no_item_file_and_names_users(tmp_path: Path) -> None:
    bought = write(tmp_path, items=False)
    options = ["baseline.model=sasrec", "baseline.epochs=1", "baseline.hidden=16", "eval.candidates=4"]
    run(*words(tmp_path), *options)
    folder = tmp_path / "run" / "sasrec" / "eval"
    check_joined(folder / "test.per_user.parquet", bought, tmp_path)
    check_joined(folder / "test.candidates.parquet", bought, tmp_path)
    refused = called(*words(tmp_path), f"run_dir={tmp_path / 'other'}", "--dry-run")
    assert refused.returncode == 2
    assert "the data have no item file, so items have no titles" in refused.stderr
    assert "prepare.metadata=FILE" in refused.stderr


@pytest.mark.slow
def test_a_language_model_and_generate_name_users(tmp_path: Path) -> None:
    bought = write(tmp_path, items=True)
    run(*words(tmp_path), "rl.enabled=false", "sft.epochs=1", "prepare.split=leave_one_out")
    table = check_joined(tmp_path / "run" / "sft" / "eval" / "test.per_user.parquet", bought, tmp_path)
    assert len(table) == USERS
    assert table["user_id"].n_unique() == USERS
    given = ["generate.split=test", "generate.rows=3", "generate.n=2"]
    answers = run(*words(tmp_path), "prepare.split=leave_one_out", *given, verb="generate")["recommendations"]
    assert [answer["user"] for answer in answers] == table["user_id"].head(3).to_list()
    assert all(item["external_id"].startswith("B") for answer in answers for item in answer["items"])
    assert len(samples()["test"]) < USERS  # the split is not 8:1:1
