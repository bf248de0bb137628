"""A slice of the crash matrix: kills inside a save, a full disk, a truncated checkpoint; each ends with the same bytes.

All of it: ``python -m tests.crash_matrix --full``; what that found is in recipes/results/crash_matrix.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.crash_matrix import cases
from tests.failpoints import POINTS
from tests.train.runs import environment

COMMITTED = Path(__file__).parents[2] / "recipes" / "results" / "crash_matrix.json"
DISK = "disk full: save.mid_shard=enospc@3"


def test_slice(small_dataset):
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash_matrix", "--data", str(small_dataset)],
        capture_output=True, text=True, timeout=550, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["cases"], result["failed"]) == (3, 0)
    assert result["sigkills"] == 6
    inside_a_save = {"save.before_write", "save.mid_shard", "save.before_rename", "save.after_rename"}
    assert set(result["events_per_point"]) == {*inside_a_save, DISK, "truncated newest checkpoint"}


def test_the_committed_matrix_is_whole():
    found = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert (found["failed"], found["points_never_reached"]) == (0, [])
    assert found["sigkills"] >= 20
    assert found["sigterms"] >= cases.TERMS
    assert min(found["events_per_point"].values()) >= 1
    assert set(POINTS) <= found["events_per_point"].keys()
