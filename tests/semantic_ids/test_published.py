"""The two published Industrial indexes, read and measured; and the committed table of every method beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tawin_nemo.semantic_ids.coder import random_codes
from tawin_nemo.semantic_ids.collisions import shared_rows
from tawin_nemo.semantic_ids.index_files import code_tokens, read_index
from tawin_nemo.semantic_ids.report import measure
from tests.benchmarks import semantic_id_table as benchmark

ITEMS = 3_686
NUMBERED = [str(item) for item in range(ITEMS)]
RESULTS = Path(__file__).parents[2] / "recipes" / "results" / "semantic_ids"
COMMITTED = sorted(RESULTS.glob("industrial.*.json"))
#: Indexes of ours that studies use; the commands are in RESULTS / README.md.
INDEXES = sorted(RESULTS.glob("*.index.json"))


def report_of(industrial: Path, file: str):
    found = read_index(industrial / f"{benchmark.NAME}.index.{file}.json", NUMBERED)
    lines = (industrial / f"{benchmark.NAME}.test.inter").read_text(encoding="utf-8").splitlines()[1:]
    target_N = np.array([int(line.split("\t")[2]) for line in lines])
    return found, measure(found.codes_IL, found.levels, np.eye(ITEMS, 4), test_target_N=target_N)


@pytest.mark.real_data
def test_minionerecs_index(industrial: Path) -> None:
    found, report = report_of(industrial, "minionerec")
    assert (found.levels, report.items, report.distinct) == (3, ITEMS, 3_670)
    assert report.levels[0].used == 48
    assert round(report.shared_test_rows, 3) == 0.070
    assert report.items_with_more_tokens == 0
    given = json.loads((industrial / f"{benchmark.NAME}.index.minionerec.json").read_text(encoding="utf-8"))
    assert code_tokens(found.codes_IL) == [given[str(item)] for item in range(ITEMS)]


@pytest.mark.real_data
def test_the_constrained_index(industrial: Path) -> None:
    found, report = report_of(industrial, "rqkmeans_constrained")
    assert (found.levels, report.distinct, report.distinct_without_dedup) == (3, ITEMS, 3_284)
    assert report.items_with_more_tokens == 683
    assert report.shared_test_rows == 0
    given = json.loads((industrial / f"{benchmark.NAME}.index.rqkmeans_constrained.json").read_text(encoding="utf-8"))
    assert code_tokens(found.codes_IL) == [given[str(item)] for item in range(ITEMS)]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_table_is_whole_and_meets_its_goals(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "commit", "date", "hardware", "text", "settings"} <= result.keys()
    by_method: dict[str, list[int | None]] = {}
    for row in result["rows"]:
        assert row["report"]["items"] == ITEMS
        by_method.setdefault(row["method"], []).append(row["seed"])
    assert by_method == {name: [None] for name in benchmark.PUBLISHED} | {name: [0, 1, 2] for name in benchmark.METHODS}
    assert benchmark.goals(result["rows"]) == result["goals"]
    assert all(goal["met"] for goal in result["goals"].values()), result["goals"]
    assert len(benchmark.shown(result["rows"])) == 8


def test_the_goals_see_a_miss() -> None:
    def row(method: str, used: int, distinct: int, error: float) -> dict:
        report = {"items": 10, "distinct": distinct, "tokens_mean": 3.0, "levels": [{"used": 256}, {"used": used}]}
        return {"method": method, "report": report | {"reconstruction_error": error}}

    plain = row("residual k-means, shared IDs", 256, 9, 0.30)
    good = benchmark.goals([plain, row(benchmark.OURS, 250, 10, 0.315)])
    assert [goal["met"] for goal in good.values()] == [True, True, True, True]
    bad = benchmark.goals([plain, row(benchmark.OURS, 249, 9, 0.316)])
    assert [goal["met"] for goal in bad.values()] == [False, True, False, False]


@pytest.mark.parametrize("path", INDEXES, ids=lambda path: path.name.split(".")[0])
def test_a_committed_index_tells_all_items_apart_with_three_codes(path: Path) -> None:
    found = read_index(path, NUMBERED, levels=3, codes=256)
    assert found.codes_IL.shape == (ITEMS, 3)
    assert not shared_rows(found.codes_IL).any()
    assert all(len(np.unique(column)) == 256 for column in found.codes_IL.T)
    assert path.name in (RESULTS / "README.md").read_text(encoding="utf-8")


def test_the_committed_random_codes_are_those_of_the_recipes_seed() -> None:
    found = read_index(RESULTS / "random.index.json", NUMBERED)
    np.testing.assert_array_equal(found.codes_IL, random_codes(ITEMS, levels=3, codes=256, seed=42))
