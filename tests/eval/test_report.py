"""The report of a fabricated run: complete, well formed, self-contained, and honest about what is absent."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tawin_nemo.config.load import to_yaml
from tawin_nemo.config.schema import Recipe
from tawin_nemo.eval.intervals import normal_interval
from tawin_nemo.eval.report import render, write_report
from tawin_nemo.eval.result import EvalResult, compare
from tawin_nemo.eval.run_files import load_report
from tawin_nemo.util.errors import DataError

VOID = {"meta", "br", "hr", "img", "input", "link"}
METRICS = ("recall@1", "recall@3", "ndcg@1", "ndcg@3")


class Page(HTMLParser):
    """Checks that tags nest, and keeps the text, the attributes and the ids of the sections' headings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.pieces: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def fabricated_result(rate: float, seed: int, rows: int = 400) -> EvalResult:
    """Ranks of the same users under a policy that hits its target at rate ``rate``."""
    rng = np.random.default_rng(0)
    luck = np.clip(rng.random(rows) + 0.02 * np.random.default_rng(seed).normal(size=rows), 0, 1)
    rank = np.where(luck < rate, np.floor(luck / rate * 5), -1).astype(np.int64)
    hits = {f"recall@{k}": ((rank >= 0) & (rank < k)).astype(float) for k in (1, 3)}
    gains = {f"ndcg@{k}": hits[f"recall@{k}"] / np.log2(np.maximum(rank, 0) + 2) for k in (1, 3)}
    facts = {"row": np.arange(rows), "user": np.arange(rows) + 7, "target": np.arange(rows) % 11, "rank": rank}
    table = pl.DataFrame({**facts, **hits, **gains})
    intervals = {name: normal_interval(table[name].to_numpy()) for name in METRICS}
    return EvalResult(
        means={name: interval.mean for name, interval in intervals.items()},
        intervals={name: (interval.low, interval.high) for name, interval in intervals.items()},
        rows=rows, invalid_rate=0.0, collisions=12, short_rows=0.25, coverage=0.4375, beams=50,
        collision="fractional", per_user=table,
        beyond={"popularity_bias@3": rate - 0.35, "coverage@10": 0.61, "coverage@3": 0.22, "first_codes@10": 4.25},
    )  # fmt: skip


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the stages sft, sft_continued and rl, and its report; tests do not change it."""
    run_dir = tmp_path_factory.mktemp("finished")
    fabricate(run_dir)
    write_report(run_dir)
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The same run without its report, to be changed."""
    fabricate(tmp_path)
    return tmp_path


def fabricate(run_dir: Path) -> None:
    rng = np.random.default_rng(5)
    (run_dir / "recipe.yaml").write_text(to_yaml(Recipe(name="fabricated <run> & co")))
    (run_dir / "summary.json").write_text(json.dumps({"wall_s": 3725.4}))
    catalog = {"items": 3686, "items_on_shared_paths": 41, "path_tokens_mean": 9.25, "rows": {"train": 36259}}
    (run_dir / "catalogue.json").write_text(json.dumps(catalog))
    for name, rate, seed, steps in (("sft", 0.3, 1, 600), ("sft_continued", 0.31, 2, 40), ("rl", 0.42, 3, 500)):
        lines: list[dict[str, Any]] = []
        for step in range(1, steps + 1):
            if name == "rl":
                noise = rng.normal(size=6)
                keys = ("rl/reward", "rl/hit_rate", "rl/frac_zero_std_groups", "rl/kl", "grad_norm", "rl/clip_fraction")
                lines.append({"step": step, **dict(zip(keys, (0.3 + 0.05 * noise).tolist(), strict=True))})
            else:
                lines.append({"step": step, "train/loss": 2 + 3 / step + 0.1 * rng.normal(), "grad_norm": 1.0})
                if step % 20 == 0:
                    lines.append({"step": step, "valid/loss": 2.2 + 3 / step})
        write_lines(run_dir / name / "metrics.jsonl", lines)
        write_lines(run_dir / name / "timings.jsonl", [{"step": s, "seconds": 0.5} for s in range(1, steps + 1)])
        fabricated_result(rate, seed).write(run_dir / name / "eval", "test")


def test_report_is_a_well_formed_page_with_every_number(finished_run: Path) -> None:
    page = Page((finished_run / "report.html").read_text(encoding="utf-8"))
    results = {name: EvalResult.read(finished_run / name / "eval", "test") for name in ("sft", "sft_continued", "rl")}
    for result in results.values():
        for metric in METRICS:
            low, high = result.intervals[metric]
            assert f"{result.means[metric]:.4f} {low:.4f} – {high:.4f}" in page.text
    for ours, theirs in (("rl", "sft"), ("rl", "sft_continued"), ("sft_continued", "sft")):
        for metric in METRICS:
            found = compare(results[ours], results[theirs], metric)
            difference = found.difference
            shown = f"{difference.mean:+.4f} {difference.low:+.4f} … {difference.high:+.4f}"
            assert f"{shown} detectable {found.detectable:.4f}" in page.text
    for fact in ("1 h 02 min 05 s", "5 min 00 s", "3,686", "train 36,259", "12 of 400", "43.8%", "25.00%"):
        assert fact in page.text
    assert page.tags.count("svg") == 1 + 2 + 6 + 1  # metrics, two SFT stages, six RL curves, the window


def test_what_lists_look_like_is_shown_by_cut_off(finished_run: Path) -> None:
    text = Page((finished_run / "report.html").read_text(encoding="utf-8")).text
    assert "Coverage @3 Coverage @10 First codes @10 Popularity bias @3" in text
    assert "SFT 22.0% 61.0% 4.25 -0.050" in text
    assert "RL 22.0% 61.0% 4.25 +0.070" in text


def test_evaluations_of_older_versions_have_gaps_there(run_dir: Path) -> None:
    path = run_dir / "sft" / "eval" / "test.json"
    facts = json.loads(path.read_text())
    del facts["beyond"]
    path.write_text(json.dumps(facts))
    assert "SFT – – – –" in Page(render(load_report(run_dir))).text
    for name in ("sft_continued", "rl"):
        (run_dir / name / "eval" / "test.json").unlink()
    assert "First codes" not in Page(render(load_report(run_dir))).text


def test_report_needs_nothing_from_outside(finished_run: Path) -> None:
    html = (finished_run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    references = {value for name, value in page.attributes if name in ("href", "src") and value}
    anchors = {value for name, value in page.attributes if name == "id"}
    assert references <= {f"#{anchor}" for anchor in anchors}


def test_names_are_escaped(finished_run: Path) -> None:
    html = (finished_run / "report.html").read_text(encoding="utf-8")
    assert "fabricated &lt;run&gt; &amp; co" in html
    assert "<run>" not in html


def test_equal_runs_give_equal_reports(run_dir: Path, finished_run: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    assert path.read_bytes() == (finished_run / "report.html").read_bytes()


def test_absent_stages_and_files_are_left_out(run_dir: Path) -> None:
    for name in ("summary.json", "catalogue.json", "sft_continued/metrics.jsonl", "sft_continued/eval/test.json"):
        (run_dir / name).unlink()
    (run_dir / "rl" / "eval" / "test.json").unlink()
    report = load_report(run_dir)
    assert [stage.name for stage in report.stages] == ["sft", "rl"]
    text = Page(render(report)).text
    assert "Paired differences" not in text
    assert "SFT continued" not in text
    assert "Gradient norm" in text


def test_a_run_that_was_evaluated_on_valid_only_shows_that(run_dir: Path) -> None:
    for path in list(run_dir.glob("*/eval/test.*")):
        path.rename(path.with_name(path.name.replace("test", "valid", 1)))
    report = load_report(run_dir)
    assert report.split == "valid"
    assert "Results on valid" in Page(render(report)).text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(Recipe()))
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "Results on test" not in text
    assert "TAWin window" in text  # known from the recipe alone


def test_other_stages_are_listed_before_rl(run_dir: Path) -> None:
    write_lines(run_dir / "grpo" / "metrics.jsonl", [{"step": 1, "train/loss": 1.0}])
    assert [stage.name for stage in load_report(run_dir).stages] == ["sft", "sft_continued", "grpo", "rl"]


def test_a_cut_off_last_line_is_ignored_and_a_broken_one_named(run_dir: Path) -> None:
    path = run_dir / "rl" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 501, "rl/rew')
    stage = load_report(run_dir).stage("rl")
    assert stage is not None
    assert stage.steps == 500
    path.write_text("nonsense\n" + whole)
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is not a JSON object with a step: 'nonsense'"):
        load_report(run_dir)


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no recipe\.yaml"):
        write_report(tmp_path)
