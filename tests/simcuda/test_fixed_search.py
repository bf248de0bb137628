"""A search in graphs on the pretended device: no mixed devices, the usual items, a tenth of the launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import forked
from tests.simcuda import graph_worker
from tests.train.runs import environment

LIMIT = 300
#: Launches and waits of the usual form of this search, in bf16, before the usual form got fewer (commit e6de6fe).
USUAL_BEFORE = (1225, 79)


@pytest.mark.slow
def test_a_search_in_graphs_on_the_device(tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    process = forked.start(graph_worker.main, [str(out)], environment(), out.with_suffix(".log"))
    failed, hung = forked.finish([process], LIMIT)
    assert not failed, out.with_suffix(".log").read_text()[-4000:]
    assert not hung
    found = json.loads(out.read_text())
    assert found["same"]
    assert found["apart"] < 1e-5  # float32
    assert (found["device"], found["faults"]) == ("cuda", 0)
    assert found["replays"] >= found["captures"] >= 3
    captured, usual = found["captured"], found["usual"]
    assert 10 * captured["launches"] <= USUAL_BEFORE[0], found
    assert 2 * captured["launches"] <= usual["launches"] <= USUAL_BEFORE[0] / 2, found
    # prompts in (three copies), three numbers after each graph, candidates out
    assert captured["syncs"] <= found["replays"] + 8, found
    assert 4 * captured["syncs"] <= USUAL_BEFORE[1], found
    assert usual["syncs"] <= found["replays"] + 8, found  # as many as the form in graphs
