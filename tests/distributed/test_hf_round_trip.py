"""Qwen2.5-0.5B's shape through TP2 x PP2 and back: the same bits, and no rank holds much more than its shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks import hf_round_trip

COMMITTED = Path(__file__).parents[2] / "recipes" / "results" / "hf_round_trip.json"


def test_the_committed_measurement_holds():
    found = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert found["bit_identical"]
    assert 900 < found["checkpoint_mb"] < 1100
    assert found["files"] > 1
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1, 2, 3]
    for rank in found["ranks"]:
        assert rank["peak_above_imports_mb"] <= 1.5 * rank["shard_mb"] + found["largest_tensor_mb"]


def test_memory_counts_what_is_touched_and_no_file_pages(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 64_000_000)
    before = hf_round_trip.anonymous_bytes("self")
    mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=64_000_000, dtype=torch.uint8)
    assert int(mapped.sum()) > 0
    assert hf_round_trip.anonymous_bytes("self") - before < 16_000_000
    kept = torch.ones(16_000_000)
    assert 48_000_000 < hf_round_trip.anonymous_bytes("self") - before < 96_000_000
    assert kept[0] == 1


@pytest.mark.distributed
@pytest.mark.full
def test_round_trip(tmp_path):
    assert hf_round_trip.main(["--json", str(tmp_path / "result.json")]) == 0
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["bit_identical"]
