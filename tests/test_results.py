"""Committed run and benchmark files: each says how it was made, and the pages of recipes/results quote it correctly."""

import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import checkpoint, shared_ids, summary

pytestmark = pytest.mark.results

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted((RECIPES / "results").glob("*.json"))
#: The pages by topic that recipes/RESULTS.md lists.
PAGES = sorted((RECIPES / "results").glob("*.md"))
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BENCHMARKS = [path for path in FILES if path.name.startswith("bench_")]
#: Its own test makes it again: tests/tools/simulate/test_simulate.py.
FIGURES = [path for path in FILES if path.name == "figure3.json"]
#: Their own tests read them (tests/run/test_crash_slice.py, tests/distributed/test_hf_round_trip.py), or make a slice
#: of them again (tests/serve/test_soak_slice.py).
MEASURED = [path for path in FILES if path.name in ("crash_matrix.json", "hf_round_trip.json", "serve_soak.json")]
#: Written by tests/gpu/run.sh.
GPU_RUNS = [path for path in FILES if path.name.startswith("gpu_")]
RUNS = [path for path in FILES if path not in [*BENCHMARKS, *FIGURES, *MEASURED, *GPU_RUNS]]


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_a_measurement_says_how_it_was_made(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "commit", "date", "hardware"} <= result.keys()
    assert f"({path.name})" in TEXT
    assert result["command"] in TEXT


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_file_is_complete_and_quoted_correctly(path):
    run = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "commit", "date", "hardware", "seed", "wall_s", "invalid_rate", "stages"} <= run.keys()
    assert f"({path.name})" in TEXT
    for stage in run["stages"].values():
        for metric in ("recall@1", "recall@3", "ndcg@3"):
            mean = f"{stage['test']['means'][metric]:.4f}".lstrip("0")
            low, high = (f"{bound:.4f}".lstrip("0") for bound in stage["test"]["intervals"][metric])
            assert re.search(rf"{re.escape(mean)}\**\s*\[{re.escape(low)}, {re.escape(high)}\]", TEXT), (metric, mean)


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_file_is_complete_and_quoted_correctly(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {
        "command", "commit", "date", "ratio", "floor_ratio", "ours_median_seconds", "baseline_median_seconds",
        "shapes", "settings", "targets", "unfair", "machine",
    } <= result.keys()  # fmt: skip
    assert re.fullmatch(rf"bench_{result['benchmark']}(\.\w+)?\.json", path.name)
    assert result["command"] in TEXT
    for line in summary.lines(path.name, result):
        assert line in TEXT, "paste what `python -m tests.benchmarks.summary recipes/results/bench_*.json` prints"


@pytest.mark.parametrize("path", GPU_RUNS, ids=lambda path: path.stem)
def test_a_gpu_file_is_complete_and_was_measured(path):
    """What it says decides whether FP8 counts as verified (``models/megatron/precision.py``)."""
    run = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "commit", "date", "machine", "sizes", "parts", "failed"} <= run.keys()
    assert run["dry_run"] is False
    assert run["machine"]["gpus"]
    assert all(part["status"] in ("passed", "failed", "skipped") for part in run["parts"].values())


def test_the_index_lists_every_page():
    index = (RECIPES / "RESULTS.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"(results/{page.name})" not in index] == []


def test_the_rows_of_shared_ids_are_quoted_as_the_run_files_give_them():
    for line in shared_ids.lines():
        assert line in TEXT, "paste what `python -m tests.benchmarks.shared_ids` prints"


def test_the_arithmetic_for_checkpoints_at_7b_is_quoted_as_it_is_computed():
    for line in checkpoint.lines():
        assert line in TEXT, "paste what `python -m tests.benchmarks.checkpoint` prints"
    for row in (row for nodes in (1, 4) for row in checkpoint.seven_b(nodes)):
        assert row["writers"] * row["written a writer"] == pytest.approx(14 * 7.6156, rel=1e-3)
        assert (row["host, resume, a node"] < 60) == (row["side"] == "pieces")


def test_the_alignment_run_is_quoted_as_it_was_measured():
    result = json.loads((RECIPES / "results" / "semantic_ids" / "alignment.json").read_text(encoding="utf-8"))
    lines = TEXT.splitlines()
    assert any(result["command"] in line for line in lines)
    for task, exact in result["tasks"].items():
        (line,) = [line for line in lines if line.startswith(f"| `{task}` |")]
        losses = [f"{result['valid'][f'valid/loss/{task}'][place][1]:.2f}" for place in (0, 1, -1)]
        shares = [f"{part['exact']:.4f}".lstrip("0") for part in (exact["held_out"], exact["trained"])]
        assert re.findall(r"\d*\.\d+", line) == [*losses, *shares]
