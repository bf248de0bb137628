"""The results page and the plots: made of run files alone, the same every time, with the numbers of the tests."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tawin_nemo.eval.paired import hierarchical_interval, holm, metric_values, paired_test
from tawin_nemo.tools.study.analysis import Line, likely_best, line_of, load_results, pair_rows, stacked, sweep_lines
from tawin_nemo.tools.study.plots import write_plots
from tawin_nemo.tools.study.record import RunRecord
from tawin_nemo.tools.study.tables import page, plain, signed
from tawin_nemo.tools.study.verb import run_study, write_page
from tawin_nemo.util.errors import DataError
from tests.tools.study.files import ARMS, FakeTraining, some_ranks, study_of, write_study

KEYS = {
    "about": "Does the window matter?",
    "splits": ["valid", "test"],
    "seeds": [1, 2, 3],
    "metrics": ["recall@1", "recall@3", "ndcg@3"],
    "facts": ["coverage"],
    "compare": [["tawin*anchor=2*", "more"], ["more", "sft"]],
    "sweeps": [{"arm": "tawin", "x": "rl.tawin.anchor", "metrics": ["recall@1", "recall@3"], "beside": ["more"]}],
    "curves": ["valid/loss"],
    "trends": ["train/loss", "rl/reward"],
    "pool": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study whose run sft.seed3 has failed, so that its children are missing."""
    folder = tmp_path_factory.mktemp("study")
    fake = FakeTraining(folder / "made", lift={"tawin": 0.1})
    fake.failing = {"sft.seed3"}
    fake.run(study_of(folder, **KEYS))
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return write_page(study_of(folder, **KEYS)).read_text(encoding="utf-8")


def values(arm: str, split: str, metric: str, lift: float = 0.0) -> np.ndarray:
    """What the runs of the two finished seeds give, without any run file."""
    return np.stack([metric_values(metric, some_ranks(f"{arm}.seed{seed}", split, lift=lift)) for seed in (1, 2)])


def row_of(text: str, *parts: str) -> str:
    (found,) = [line for line in text.splitlines() if all(part in line for part in parts)]
    return found


def section(text: str, title: str) -> str:
    return re.split(r"\n##+ ", text.split(f"## {title}", 1)[1], maxsplit=1)[0]


def test_the_page_is_the_same_every_time_and_needs_the_run_files_only(folder, text):
    plots = {path.name: path.read_bytes() for path in (folder / "results/probe").glob("*.png")}
    run_study(write_study(folder, **KEYS), ["report=true", f"run_root={folder / 'nothing'}"])
    assert (folder / "results/probe/README.md").read_text(encoding="utf-8") == text
    assert plots == {path.name: path.read_bytes() for path in (folder / "results/probe").glob("*.png")}
    assert plots.keys() == {"sweep.tawin.anchor.valid.png", "sweep.tawin.anchor.test.png",
                            "sweep.tawin.anchor.valid+test.png", "curve.valid_loss.png"}  # fmt: skip
    for name in plots:
        assert f"![{name}]({name})" in text
    assert "Does the window matter?" in text
    assert "--recipe" in text
    assert str(folder) not in text


def test_means_and_intervals_are_those_of_the_ranks(text):
    interval = hierarchical_interval(values("more", "test", "recall@3"))
    expected = f"{plain(interval.mean)} [{plain(interval.low)}, {plain(interval.high)}]"
    row = row_of(section(text, "test: 200 rows"), "`more`")
    assert row.startswith("| `more` | 2 of 3 |")
    assert expected in row
    assert row.endswith("| 0.5 | 0.5 |")  # coverage, minutes


def test_an_arm_with_shared_ids_is_shown_with_full_credit_as_well(folder, tmp_path, text):
    study = study_of(tmp_path, **KEYS)
    shutil.copytree(folder / "results/probe", tmp_path / "results/probe", dirs_exist_ok=True)
    sharing = np.where(np.arange(200) % 3 == 0, 2, 1)
    for path in (tmp_path / "results/probe").glob("more.seed?.json"):
        record = RunRecord.read(path)
        parts = {name: replace(part, sharing_B=sharing) for name, part in record.splits.items()}
        parts = {n: replace(p, means={m: float(p.values(m).mean()) for m in p.means}) for n, p in parts.items()}
        replace(record, splits=parts).write(path)
    lines = section(page(load_results(study), []), "test: 200 rows").splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("| `more` |"))
    full = hierarchical_interval(values("more", "test", "recall@3"))
    part = hierarchical_interval(values("more", "test", "recall@3") / sharing)
    assert f" {plain(part.mean)} [" in lines[place]
    assert lines[place + 1].startswith("| `more`, shared IDs in full |")
    assert f"{plain(full.mean)} [{plain(full.low)}, {plain(full.high)}]" in lines[place + 1]
    assert "shared IDs in full" not in text


def test_both_ends_of_training_are_shown(text):
    row = row_of(section(text, "In training: first tenth, last tenth"), "`more`")
    assert row == "| `more` | 2, 1 | – |"


def test_paired_differences_are_those_of_the_ranks(text):
    ours = values("tawin[anchor=2,window=start]", "valid", "recall@1", lift=0.1)
    found = paired_test(ours, values("more", "valid", "recall@1"))
    row = row_of(section(text, "Paired differences, valid\n"), "`tawin[anchor=2,window=start]` - `more`", "R@1")
    for part in (
        f"{signed(found.difference.mean)} [{signed(found.difference.low)}, {signed(found.difference.high)}]",
        " ".join(signed(value) for value in found.per_seed),
        plain(found.detectable),
    ):
        assert part in row
    assert ("**" in row) is found.difference.excludes_zero


def test_pooled_rows_are_both_splits_of_the_same_seed(folder):
    results = load_results(study_of(folder, **KEYS))
    pooled = results.values("more", "valid+test", "ndcg@3")
    parts = [values("more", split, "ndcg@3") for split in ("valid", "test")]
    assert list(pooled) == [1, 2]
    assert np.array_equal(stacked(pooled), np.concatenate(parts, axis=1))


def test_holm_runs_over_all_pairs_of_one_metric(folder):
    rows = pair_rows(load_results(study_of(folder, **KEYS)), "valid", "recall@3")
    assert [(row.ours, row.theirs) for row in rows] == [
        ("tawin[anchor=2,window=centred]", "more"), ("tawin[anchor=2,window=start]", "more"), ("more", "sft"),
    ]  # fmt: skip
    assert [row.p_holm for row in rows] == holm([row.test.p for row in rows])
    assert rows[0].seeds == (1, 2)


def test_failed_and_missing_runs_are_told(text):
    assert "2 of 3 (1 failed)" in row_of(section(text, "valid: 200 rows"), "`sft`")
    assert "| `sft` | 3 | 2 | `tawin-nemo train: sft.seed3 is broken` |" in text
    absent = row_of(text, "Not run yet")
    assert "`more.seed3`" in absent
    assert "`tawin[anchor=0,window=start].seed3`" in absent
    assert "sft.seed3" not in absent


def test_a_sweep_names_the_best_and_how_sure_that_is(text):
    part = section(text, "`tawin` against anchor, valid\n")
    assert len(re.findall(r"^\| R@[13] \| window=(?:centred|start) \| [012] \|", part, re.MULTILINE)) == 12
    assert len(re.findall(r"^- R@[13], window=\w+: anchor [012], 95 %: [012] to [012]$", part, re.MULTILINE)) == 4


def test_a_sweep_minus_an_arm_shows_paired_differences(folder, tmp_path):
    sweep = {"arm": "tawin", "x": "rl.tawin.anchor", "metrics": ["recall@3"], "minus": "more"}
    study = study_of(folder, **{**KEYS, "sweeps": [sweep], "pool": False})
    lines = sweep_lines(load_results(study), study.file.sweeps[0], "test", "recall@3")
    ours = values("tawin[anchor=1,window=start]", "test", "recall@3", lift=0.1)
    expected = paired_test(ours, values("more", "test", "recall@3")).difference
    assert [line.label for line in lines] == ["window=centred", "window=start"]
    assert lines[1].means[1] == expected
    text = page(load_results(study), [])
    row = row_of(section(text, "`tawin` minus `more` against anchor, test\n"), "| window=start | 1 |")
    assert f"{signed(expected.mean)} [{signed(expected.low)}, {signed(expected.high)}]" in row
    assert "sweep.tawin-more.anchor.test.png" in write_plots(load_results(study), tmp_path)


def test_the_likely_range_grows_around_the_best():
    from tawin_nemo.eval.intervals import Interval

    means = tuple(Interval(mean, 0, 1) for mean in (0.1, 0.3, 0.2, 0.0))
    line = Line("x", (0.0, 2.0, 4.0, 8.0), means, (0.02, 0.68, 0.29, 0.01))
    assert likely_best(line) == (2.0, 2.0, 4.0)
    assert likely_best(line, 0.985) == (2.0, 0.0, 4.0)
    assert likely_best(line, 0.5) == (2.0, 2.0, 2.0)


def test_a_sweep_finds_a_setting_that_is_clearly_best():
    rng = np.random.default_rng(0)
    base = (rng.random((2, 500)) < 0.1).astype(float)
    better = np.maximum(base, rng.random((2, 500)) < 0.2)
    line = line_of("x", [(0.0, {1: base[0], 2: base[1]}), (1.0, {1: better[0], 2: better[1]})])
    assert line.best[1] > 0.99
    assert likely_best(line) == (1.0, 1.0, 1.0)


def test_run_files_of_other_rows_are_not_paired(folder, tmp_path):
    fake = FakeTraining(tmp_path / "made", rows=100)
    fake.run(study_of(tmp_path, arms={"sft": {}}, seeds=[1], splits=["valid"]))
    study = study_of(tmp_path, arms={"sft": {}, "more": {}}, seeds=[1], compare=[["sft", "other/more"]],
                     results=str(tmp_path / "results/probe"))  # fmt: skip
    (tmp_path / "results" / "other").symlink_to(folder / "results" / "probe")
    with pytest.raises(DataError, match=r"sft and other/more were evaluated on different valid rows"):
        page(load_results(study), [])


def test_arms_of_other_studies_are_compared(folder, tmp_path):
    FakeTraining(tmp_path / "made").run(study_of(tmp_path, arms={"mine": {}}, seeds=[1, 2]))
    (tmp_path / "results" / "other").symlink_to(folder / "results" / "probe")
    study = study_of(tmp_path, arms={"mine": {}}, compare=[["mine", "other/more"]])
    (row,) = pair_rows(load_results(study), "valid", "recall@3")
    expected = paired_test(values("mine", "valid", "recall@3"), values("more", "valid", "recall@3"))
    assert row.test == expected


def test_run_files_without_an_arm_are_told(folder, tmp_path):
    study = study_of(folder, **{**KEYS, "arms": {"sft": ARMS["sft"]}, "compare": [], "sweeps": []})
    text = page(load_results(study), [])
    assert "`more.seed1`" in row_of(text, "no longer has")


def test_nothing_is_plotted_before_there_is_a_run(tmp_path):
    results = load_results(study_of(tmp_path, **KEYS))
    assert write_plots(results, tmp_path) == []
    assert "None is finished." in page(results, [])


def test_a_dry_run_says_what_would_run(folder, caplog):
    line, code = run_study(write_study(folder, **KEYS), [], dry_run=True)
    assert code == 0
    assert line["done"] == 16
    assert line["to_run"][0] == "sft.seed3"
    assert len(line["to_run"]) == 8
    assert json.dumps(line)
