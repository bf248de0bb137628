"""Overlapped reduction and gather (``trainer.overlap_*``) compute the bits of the plain form (gloo, megatron-core).

With two replicas every sum has two terms, whatever the bucket. Not covered here: NCCL, streams, time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch

WORKER = Path(__file__).parent / "overlap_worker.py"
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "model"),
    [
        pytest.param(2, {}, id="dp2"),
        pytest.param(2, {"precision": "bf16"}, id="dp2-bf16", marks=pytest.mark.full),
        pytest.param(2, {"recompute": "full"}, id="dp2-recompute", marks=pytest.mark.full),
        pytest.param(4, {**TP2, **SP}, id="tp2-sp-dp2", marks=pytest.mark.full),
        pytest.param(4, PP2, id="pp2-dp2", marks=pytest.mark.full),
    ],
)
def test_overlapped_steps_are_the_plain_ones(processes: int, model: dict[str, Any], tmp_path: Path) -> None:
    launch(WORKER, processes, json.dumps({"model": model}), str(tmp_path), folder=tmp_path)
