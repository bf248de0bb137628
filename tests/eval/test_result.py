"""What an evaluation leaves behind: files that round trip, paired comparisons."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.eval.result import EvalResult, compare, results_table
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


def test_full_credit_comes_with_the_divided_credit_beside_it(catalog: Catalog) -> None:
    """The papers count a match of the text; the fair figure of rows whose target shares its path stands below it."""
    samples, engine = make_samples(TARGETS), ListedEngine(catalog, LISTS)
    divided = run(engine, samples, catalog, collision="fractional")
    full = run(engine, samples, catalog, collision="optimistic")
    assert full.collisions > 0
    assert full.means["recall@3"] > divided.means["recall@3"]
    for name, value in full.fractional_means().items():
        assert value == pytest.approx(divided.means[name], abs=1e-12)
    assert divided.fractional_means() == divided.means
    assert f"{divided.means['recall@3']:.4f}" in results_table({"rl": full}, [1, 3]).splitlines()[2]
    assert len(results_table({"rl": divided}, [1, 3]).splitlines()) == 2
