"""The tables of a study as CSV and LaTeX: the numbers of the page, in files that other programs read."""

import polars as pl
import pytest

from tawin_nemo.tools.study.analysis import load_results, pair_rows
from tawin_nemo.tools.study.export import escaped, write_tables
from tawin_nemo.tools.study.tables import plain, signed
from tawin_nemo.tools.study.verb import run_study
from tests.tools.study.files import FakeTraining, study_of, write_study

KEYS = {
    "splits": ["valid", "test"], "seeds": [1, 2], "metrics": ["recall@1", "ndcg@3"], "compare": [["more", "sft"]],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    FakeTraining(folder / "made", lift={"more": 0.2}).run(study_of(folder, **KEYS))
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    path = folder / "tables"
    result, code = run_study(write_study(folder, **KEYS), ["report=true", f"export={path}"])
    assert (code, result["study"]) == (0, "probe")
    return path


def test_csv_files_hold_the_numbers_of_the_page(folder, exported):
    results = load_results(study_of(folder, **KEYS))
    arms = pl.read_csv(exported / "arms.csv")
    assert arms.height == len(results.study.arms) * 2 * 2
    for arm, split, metric, seeds, *numbers in arms.rows():
        mean = results.mean(arm, split, metric)
        assert (seeds, numbers) == (2, pytest.approx([mean.mean, mean.low, mean.high]))
    (row,) = pair_rows(results, "test", "ndcg@3")
    pairs = pl.read_csv(exported / "pairs.csv").filter(pl.col("split") == "test", pl.col("metric") == "ndcg@3")
    assert pairs.row(0, named=True) == {
        "ours": "more", "theirs": "sft", "split": "test", "metric": "ndcg@3", "p_holm": pytest.approx(row.p_holm),
        "difference": pytest.approx(row.test.difference.mean), "low": pytest.approx(row.test.difference.low),
        "high": pytest.approx(row.test.difference.high), "p": pytest.approx(row.test.p),
        "detectable": pytest.approx(row.test.detectable),
    }  # fmt: skip


def test_latex_tables_mark_the_best_arm_and_sure_differences(folder, exported):
    results = load_results(study_of(folder, **KEYS))
    lines = (exported / "arms.valid.tex").read_text().splitlines()
    best = max(results.study.arms, key=lambda arm: results.mean(arm.name, "valid", "recall@1").mean).name
    (line,) = [line for line in lines if line.startswith(f"{escaped(best)} &")]
    mean = results.mean(best, "valid", "recall@1")
    assert f"\\textbf{{{plain(mean.mean)}}} {{\\small [{plain(mean.low)}, {plain(mean.high)}]}}" in line
    assert sum("textbf" in line.split("&")[1] for line in lines if line.count("&") == 2) == 1
    (row,) = pair_rows(results, "valid", "recall@1")
    assert row.test.difference.excludes_zero
    assert (
        f"more $-$ sft & \\textbf{{{signed(row.test.difference.mean)}}}" in (exported / "pairs.valid.tex").read_text()
    )


def test_without_pairs_there_are_no_files_of_pairs(folder, tmp_path):
    results = load_results(study_of(folder, **{**KEYS, "compare": []}))
    names = {path.name for path in write_tables(results, tmp_path / "tables")}
    assert (
        names
        == {path.name for path in (tmp_path / "tables").iterdir()}
        == {"arms.csv", "arms.valid.tex", "arms.test.tex"}
    )


def test_what_latex_would_misread_is_escaped():
    assert escaped(r"a_b & 5% {x} #1 $2 ~ ^ \n") == (
        r"a\_b \& 5\% \{x\} \#1 \$2 \textasciitilde{} \^{} \textbackslash{}n"
    )
