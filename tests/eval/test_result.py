"""What an evaluation leaves behind: files that round trip, paired comparisons."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.eval.result import EvalResult, compare
from tawin_nemo.util.errors import DataError
from tests.eval.listed_engine import (
    LISTS,
    TARGETS,
    ListedEngine,
    make_catalog,
    make_samples,
    run,
)


@pytest.fixture
def catalog() -> Catalog:
    return make_catalog()


def test_files_round_trip(catalog: Catalog, tmp_path: Path) -> None:
    result = run(ListedEngine(catalog, LISTS), make_samples(TARGETS), catalog)
    result.write(tmp_path / "eval", "test")
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["test.json", "test.per_user.parquet"]
    again = EvalResult.read(tmp_path / "eval", "test")
    assert list(again.means) == list(again.intervals) == list(result.means)
    assert again.per_user.equals(result.per_user)
    for field in dataclasses.fields(EvalResult):
        if field.name != "per_user":
            assert getattr(again, field.name) == getattr(result, field.name)
    (tmp_path / "eval" / "test.json").write_text('{"means": {}}')
    with pytest.raises(DataError, match=r"eval/test\.json"):
        EvalResult.read(tmp_path / "eval", "test")


def test_comparison_is_paired_by_row(catalog: Catalog) -> None:
    samples = make_samples(TARGETS)
    ours = run(ListedEngine(catalog, LISTS), samples, catalog)
    theirs = run(ListedEngine(catalog, [[3, 5, 0, 1]] * 6), samples, catalog)
    found = compare(ours, theirs, "recall@3")
    assert found.difference.mean == pytest.approx(ours.means["recall@3"] - theirs.means["recall@3"])
    assert found.detectable > 0
    with pytest.raises(DataError, match="6 rows against 5"):
        compare(ours, run(ListedEngine(catalog, LISTS), make_samples(TARGETS[:5]), catalog), "recall@3")
    with pytest.raises(DataError, match="metric recall@7"):
        compare(ours, theirs, "recall@7")


def test_files_of_older_versions_are_read(catalog: Catalog, tmp_path: Path) -> None:
    result = run(ListedEngine(catalog, LISTS), make_samples(TARGETS), catalog)
    result.write(tmp_path, "test")
    facts = json.loads((tmp_path / "test.json").read_text())
    assert facts["beyond"] == result.beyond
    del facts["beyond"]
    (tmp_path / "test.json").write_text(json.dumps(facts))
    again = EvalResult.read(tmp_path, "test")
    assert again.beyond == {}
    assert again.means == result.means
