"""Nightly runs of several processes, by the command line: training together, or with a rank that only rolls out."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.tools.retrain.test_end_to_end import FIRST, IDLE, NIGHT, REFUSED, RUINED, SECOND, published
from tests.train.runs import called, command, environment

TOGETHER = ("trainer.devices=2",)
APART = ("trainer.devices=2", "rollout.placement=separate", "rollout.devices=1")


def nightly_run(root: Path, date: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = command(f"retrain.root={root}", f"retrain.date={date}", *NIGHT, *overrides, verb="retrain")
    return subprocess.run(words, capture_output=True, text=True, timeout=500, env=environment())


def assert_refused(root: Path, processes: tuple[str, ...]) -> None:
    """A second nightly run, which unlearns everything, leaves the first one published."""
    second = nightly_run(root, SECOND, *processes, *RUINED)
    assert second.returncode == REFUSED, second.stderr[-4000:]
    result = json.loads(second.stdout.strip().splitlines()[-1])
    assert (result["published"], published(root)) == (False, FIRST)
    assert result["reasons"] == json.loads((root / "runs" / SECOND / "gate.json").read_text())["reasons"] != []
    assert "Traceback" not in second.stderr
    assert "continues from the last checkpoint" not in second.stderr  # nothing failed


@pytest.mark.full
@pytest.mark.distributed
def test_two_processes_are_refused_with_one_code(tmp_path):
    """The first nightly run in one process; the launcher hands on the refusal of the second, once."""
    first = called(f"retrain.root={tmp_path}", f"retrain.date={FIRST}", *NIGHT, *IDLE, verb="retrain")
    assert (first.returncode, published(tmp_path)) == (0, FIRST), first.stderr[-4000:]
    assert_refused(tmp_path, TOGETHER)


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [pytest.param(TOGETHER, id="together"), pytest.param(APART, id="apart")])
def test_a_nightly_run_is_published_the_next_refused(processes, tmp_path):
    first = nightly_run(tmp_path, FIRST, *processes, *IDLE)
    assert first.returncode == 0, first.stderr[-4000:]
    (line,) = first.stdout.strip().splitlines()
    assert (json.loads(line)["published"], published(tmp_path)) == (True, FIRST)
    layout = json.loads((tmp_path / "runs" / FIRST / "layout.json").read_text())
    assert [rank.get("role", f"replica {rank['dp_rank']}") for rank in layout] == (
        ["replica 0", "replica 1"] if processes == TOGETHER else ["replica 0", "rollout"]
    )
    assert_refused(tmp_path, processes)
