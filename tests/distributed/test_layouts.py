"""Every parallel layout trains, scores and decodes like one process (gloo, real megatron-core)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.launch import launch

WORKER = Path(__file__).parent / "layout_worker.py"
#: float32 sums in another order; losses are of order 1, five AdamW steps at lr 1e-2 amplify rounding a little.
LOSS_RELATIVE = 2e-5
#: log-probs and logits of weights after five such steps.
LOGIT_ABSOLUTE = 2e-3


def run(folder: Path, processes: int, *, optimizer: bool, tied: bool = True, **model: Any) -> dict[str, Any]:
    options = json.dumps({"model": model, "distributed_optimizer": optimizer, "tied": tied})
    launch(WORKER, processes, options, str(folder / "result.json"), folder=folder)
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    return {tied: run(folder / str(tied), 1, optimizer=False, tied=tied) for tied in (True, False)}


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "optimizer", "tied", "model"),
    [
        pytest.param(2, False, True, TP2, id="tp2"),
        pytest.param(2, False, True, PP2, id="pp2"),
        pytest.param(2, False, False, PP2, id="pp2-untied"),
        pytest.param(2, True, False, {**TP2, "sequence_parallel": True}, id="tp2-sp-untied"),
        pytest.param(2, True, True, {}, id="dp2-distributed-optimizer"),
        pytest.param(4, True, True, {**TP2, **PP2, "sequence_parallel": True}, id="tp2-pp2-sp"),
        pytest.param(4, True, True, {**PP2}, id="dp2-pp2-distributed-optimizer"),
    ],
)
def test_layout_equals_one_process(
    processes: int,
    optimizer: bool,
    tied: bool,
    model: dict[str, Any],
    one_process: dict[bool, dict[str, Any]],
    tmp_path: Path,
) -> None:
    expected, got = one_process[tied], run(tmp_path, processes, optimizer=optimizer, tied=tied, **model)
    for space in ("vocab", "trie"):
        for step, (want, have) in enumerate(zip(expected[space]["stats"], got[space]["stats"], strict=True)):
            assert have["positions"] == want["positions"]
            assert have["loss"] == pytest.approx(want["loss"], rel=LOSS_RELATIVE), (space, step)
            assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3), (space, step)
        assert got[space]["scores"] == pytest.approx(expected[space]["scores"], abs=LOGIT_ABSOLUTE)
    assert expected["vocab"]["stats"][0]["loss"] > 1.01 * expected["vocab"]["stats"][-1]["loss"]  # it learns at all
    assert got["logits"] == pytest.approx(expected["logits"], abs=LOGIT_ABSOLUTE)
