"""RL under every pair of a training layout and a rollout layout equals RL in one process (gloo, real megatron-core).

Training TP, PP, DP and sequence parallelism in {1, 2} on 2 and on 4 processes, rollouts with TP and PP in {1, 2} and
the rest of the processes as replicas. Each group of layouts shares one start of its processes.
"""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch
from tests.distributed.rollout_worker import STEPS, Pair, options_of, train, weights

WORKER = Path(__file__).parent / "rollout_worker.py"
#: Everything that is logged, among it losses and gradient norms: float32 sums in another order over three steps.
STATISTIC_RELATIVE, STATISTIC_ABSOLUTE = 1e-4, 5e-6
#: Scores of candidates: sums of up to five log-probs.
SCORE_ABSOLUTE = 1e-5
#: Weights after three AdamW steps at lr 1e-3, in which rounding decides the direction of the smallest gradients.
WEIGHT_ABSOLUTE = 2e-5

ROLLOUTS = [(0, 0), (1, 1), (2, 1), (1, 2), (2, 2)]


def pairs(processes: int, *trainings: tuple[int, int, bool]) -> list[Pair]:
    """Every training layout with every rollout layout that the processes allow."""
    return [
        Pair(tp, pp, sp, *rollout)
        for tp, pp, sp in trainings
        for rollout in ROLLOUTS
        if rollout[0] * rollout[1] <= processes and rollout != (tp, pp)
    ]


TWO = [*pairs(2, (1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False)), Pair(1, 2, False, 2, 1, tied=False)]
FOUR = [
    *pairs(4, (2, 2, True)),
    *(Pair(2, 1, False, *rollout) for rollout in ((1, 1), (2, 2))),
    *(Pair(1, 2, False, *rollout) for rollout in ((1, 1), (2, 1))),
]
REST = [
    *(p for p in pairs(4, (2, 1, False), (1, 2, False)) if p not in FOUR),
    *pairs(4, (1, 1, False), (2, 2, False), (2, 1, True)),
    Pair(1, 1, False, 2, 2, tied=False),
]


def test_no_pair_of_layouts_is_missing() -> None:
    """TP, PP, DP and sequence parallelism (which needs TP) in {1, 2} on 2 to 4 processes, with every rollout layout."""
    wanted = set()
    for tp, pp, dp, sp, rollout in product((1, 2), (1, 2), (1, 2), (False, True), ROLLOUTS):
        processes = tp * pp * dp
        possible = 2 <= processes <= 4 and tp >= 1 + sp and math.prod(rollout) <= processes
        if possible and rollout != (tp, pp):  # which is (0, 0)
            wanted.add((processes, tp, pp, sp, rollout))
    tested = {
        (processes, pair.tp, pair.pp, pair.sequence_parallel, (pair.rollout_tp, pair.rollout_pp))
        for processes, chosen in ((2, TWO), (4, FOUR + REST))
        for pair in chosen
    }
    assert wanted <= tested, wanted - tested


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, dict[str, Any]]]:
    """Per kind of head: the folder with the weights after three steps, and what was logged and rolled out."""
    made = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("one")
        made[tied] = folder, train(Pair(tied=tied), folder)
    return made


def assert_same(got: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    for step, (have, want) in enumerate(zip(got["stats"], expected["stats"], strict=True)):
        assert have.keys() == want.keys()
        for key, value in want.items():
            close = math.isclose(have[key], value, rel_tol=STATISTIC_RELATIVE, abs_tol=STATISTIC_ABSOLUTE)
            assert close, (name, step, key, have[key], value)
    for have, want in zip(got["rollouts"], expected["rollouts"], strict=True):
        assert have["items"] == want["items"], name
        for ours, theirs in zip(have["scores"], want["scores"], strict=True):
            assert ours == pytest.approx(theirs, abs=SCORE_ABSOLUTE), name
    assert got["searched"] == pytest.approx(expected["searched"]), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "chosen"),
    [
        pytest.param(2, TWO, id="2-processes"),
        pytest.param(4, FOUR, id="4-processes", marks=pytest.mark.full),
        pytest.param(4, REST, id="4-processes-more", marks=pytest.mark.full),
    ],
)
def test_layouts_equal_one_process(
    processes: int, chosen: list[Pair], one_process: dict[bool, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    launch(WORKER, processes, options_of(chosen), str(tmp_path), folder=tmp_path, limit=500)
    for number, pair in enumerate(chosen):
        folder, expected = one_process[pair.tied]
        assert_same(json.loads((tmp_path / f"{number}.json").read_text()), expected, pair.name)
        ours, theirs = weights(tmp_path / str(number)), weights(folder)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (ours[key] - value).abs().max() <= WEIGHT_ABSOLUTE, (pair.name, key)


def test_one_process_learns(one_process: dict[bool, tuple[Path, dict[str, Any]]]) -> None:
    """Guards the comparison above: equal numbers would mean nothing if no step changed anything."""
    for _, result in one_process.values():
        assert len(result["stats"]) == STEPS
        assert all(step["grad_norm"] > 1e-3 for step in result["stats"])
        assert result["rollouts"][0]["scores"] != result["rollouts"][1]["scores"]
