"""Adapters train, score, search, merge and are stored under every layout as in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tests.distributed.launch import launch
from tests.distributed.lora_worker import measure
from tests.distributed.test_layouts import GRAD_NORM_RELATIVE, LOGIT_ABSOLUTE, LOSS_RELATIVE

WORKER = Path(__file__).parent / "lora_worker.py"
#: Merged float32 weights after the same five steps; AdamW turns rounding in tiny gradients into parts of lr = 1e-2.
WEIGHT_ABSOLUTE = 2e-4
#: The same adapters merged under two layouts: products of other sizes.
MERGE_ABSOLUTE = 1e-6

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
FULL = pytest.mark.full


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, dict[str, Any]]]:
    """Per kind of optimizer: folder and numbers of one process."""
    made = {}
    for distributed in (False, True):
        folder = tmp_path_factory.mktemp("one")
        made[distributed] = folder, measure(ModelConfig(), TrainerConfig(distributed_optimizer=distributed), folder)
    return made


def assert_close(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for have, want in zip(got, expected, strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=LOSS_RELATIVE)
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=GRAD_NORM_RELATIVE)


def assert_same_weights(one: Path, other: Path, tolerance: float) -> None:
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "distributed", "model"),
    [
        pytest.param(2, False, TP2, id="tp2"),
        pytest.param(2, True, {**TP2, **SP}, id="tp2-sp-distributed-optimizer"),
        pytest.param(2, False, PP2, id="pp2"),
        pytest.param(2, True, {}, id="dp2-distributed-optimizer"),
        pytest.param(2, True, {**PP2, "recompute": "full"}, id="pp2-recompute", marks=FULL),
        pytest.param(4, True, {**TP2, **PP2, **SP}, id="tp2-pp2-sp-distributed-optimizer", marks=FULL),
        pytest.param(4, True, {**TP2, **SP}, id="dp2-tp2-sp-distributed-optimizer", marks=FULL),
    ],
)
def test_layout_equals_one_process(
    processes: int, distributed: bool, model: dict[str, Any], one_process: dict[bool, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
) -> None:  # fmt: skip
    one, expected = one_process[distributed]
    options = json.dumps({"model": model, "distributed_optimizer": distributed})
    launch(WORKER, processes, options, str(tmp_path), str(one / "step_5"), folder=tmp_path)
    got = json.loads((tmp_path / "result.json").read_text())
    for case in ("tied", "untied"):
        assert_close(got[case]["stats"], expected[case]["stats"])
        assert got[case]["scores"] == pytest.approx(expected[case]["scores"], abs=LOGIT_ABSOLUTE)
        assert got[case]["logits"] == pytest.approx(expected[case]["logits"], abs=LOGIT_ABSOLUTE)
    assert_close(got["next"], expected["next"])
    assert_same_weights(tmp_path / "merged.safetensors", one / "merged.safetensors", WEIGHT_ABSOLUTE)
    # the checkpoint of one process, loaded by this layout
    assert_same_weights(tmp_path / "merged_of_other.safetensors", one / "merged.safetensors", MERGE_ABSOLUTE)
    assert_close(got["next_of_other"], expected["next"])


def test_one_process_learns(one_process: dict[bool, tuple[Path, dict[str, Any]]]) -> None:
    """Guards the comparison above: equal losses would mean nothing if they never moved."""
    for _, numbers in one_process.values():
        for case in ("tied", "untied"):
            losses = [step["loss"] for step in numbers[case]["stats"]]
            assert losses[0] > 1.02 * losses[-1], losses
