"""Every parallel layout trains, scores and decodes like one process (gloo, real megatron-core)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tests.distributed.launch import launch
from tests.distributed.layout_worker import measure, total_positions

WORKER = Path(__file__).parent / "layout_worker.py"
#: float32 sums in another order; losses are of order 1, five AdamW steps at lr 1e-2 amplify rounding a little.
LOSS_RELATIVE = 2e-5
GRAD_NORM_RELATIVE = 1e-3
#: log-probs with weights after five such steps.
LOGIT_ABSOLUTE = 2e-3

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return measure(ModelConfig(), TrainerConfig(distributed_optimizer=False))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "distributed_optimizer", "model"),
    [
        pytest.param(2, False, TP2, id="tp2"),
        pytest.param(2, False, PP2, id="pp2"),
        pytest.param(2, False, {**TP2, **SP}, id="tp2-sp"),
        pytest.param(2, True, {}, id="dp2-distributed-optimizer"),
        pytest.param(4, True, {**TP2, **PP2, **SP}, id="tp2-pp2-sp-distributed-optimizer"),
        pytest.param(4, True, PP2, id="dp2-pp2-distributed-optimizer", marks=pytest.mark.slow),
        pytest.param(4, True, TP2, id="dp2-tp2-distributed-optimizer"),
        pytest.param(4, False, {**TP2, **SP}, id="dp2-tp2-sp"),
        pytest.param(4, False, {**TP2, **PP2}, id="tp2-pp2"),
    ],
)
def test_layout_equals_one_process(
    processes: int, distributed_optimizer: bool, model: dict[str, Any], one_process: dict[str, Any], tmp_path: Path
) -> None:
    options = json.dumps({"model": model, "distributed_optimizer": distributed_optimizer})
    launch(WORKER, processes, options, str(tmp_path / "result.json"), folder=tmp_path)
    got = json.loads((tmp_path / "result.json").read_text())
    assert got.keys() == one_process.keys()
    for case, expected in one_process.items():
        for step, (want, have) in enumerate(zip(expected["stats"], got[case]["stats"], strict=True)):
            assert have["positions"] == want["positions"] == total_positions(case.split(",")[0])
            assert have["loss"] == pytest.approx(want["loss"], rel=LOSS_RELATIVE), (case, step)
            assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=GRAD_NORM_RELATIVE), (case, step)
        assert got[case]["scores"] == pytest.approx(expected["scores"], abs=LOGIT_ABSOLUTE)
        assert got[case]["logits"] == pytest.approx(expected["logits"], abs=LOGIT_ABSOLUTE)


def test_one_process_learns(one_process: dict[str, Any]) -> None:
    """Guards the comparison above: equal losses would mean nothing if they never moved."""
    for case in one_process.values():
        assert case["stats"][0]["loss"] > 1.2 * case["stats"][-1]["loss"]
