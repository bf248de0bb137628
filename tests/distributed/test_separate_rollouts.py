"""RL whose rollouts run on ranks of their own equals RL in one process; one step ahead it equals a plain loop that
searches with the weights before the last update (gloo, real megatron-core)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tawin_nemo.config.schema import ModelConfig, RolloutConfig, TrainerConfig
from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.hf.io import save_hf
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.train.actor import Actor
from tawin_nemo.train.reference import build_reference
from tawin_nemo.train.rewards import RankingReward
from tawin_nemo.train.rl import candidate_weights
from tawin_nemo.types import DataParallel
from tests.distributed.launch import launch
from tests.distributed.rollout_worker import (
    LR,
    RL_AHEAD,
    SHAPE,
    STEPS,
    Pair,
    facts,
    options_of,
    prompts,
    small_catalog,
    train,
    weights,
)
from tests.distributed.test_rollout_layouts import (
    STATISTIC_ABSOLUTE,
    STATISTIC_RELATIVE,
    WEIGHT_ABSOLUTE,
    assert_same,
)

WORKER = Path(__file__).parent / "rollout_worker.py"


def apart(ahead: int, searching: int, **layout: Any) -> Pair:
    return Pair(searching=searching, ahead=ahead, **{"rollout_tp": 1, "rollout_pp": 1, **layout})


#: By the number of processes: training on one or two of them, rollouts on one or two others, one model or two replicas.
JOBS = {
    2: [apart(0, 1), apart(1, 1)],
    3: [
        apart(0, 1),  # two replicas train
        apart(0, 1, tp=2),
        apart(1, 1, tp=2, sequence_parallel=True),
        apart(0, 2),
        apart(0, 2, rollout_tp=2),
        apart(1, 2, rollout_tp=2),
        apart(0, 2, rollout_pp=2),
        apart(0, 1, pp=2, tied=False),
    ],
    4: [
        apart(1, 2),  # two replicas train in the first three
        apart(1, 2, rollout_tp=2),
        apart(0, 2, rollout_pp=2),
        apart(0, 2, tp=2),
        apart(0, 2, tp=2, rollout_tp=2),
        apart(1, 2, tp=2, rollout_pp=2),
        apart(0, 2, tp=2, sequence_parallel=True),
        apart(1, 2, tp=2, sequence_parallel=True, rollout_tp=2),
        apart(0, 2, tp=2, sequence_parallel=True, rollout_pp=2),
        apart(1, 2, pp=2),
        apart(0, 2, pp=2, rollout_tp=2),
        apart(1, 2, pp=2, rollout_pp=2),
    ],
}

Result = tuple[Path, dict[str, Any]]


def test_no_pair_of_layouts_is_missing() -> None:
    """One process or TP, PP, DP of two (and sequence parallelism) trains, one or two search, in every layout."""
    trainings = [(1, 1, 1, False), (1, 1, 2, False), (2, 1, 1, False), (2, 1, 1, True), (1, 2, 1, False)]
    searches = [(1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 1)]
    wanted = {(training, search) for training in trainings for search in searches}
    tested = set()
    for processes, jobs in JOBS.items():
        for pair in jobs:
            replicas = (processes - pair.searching) // (pair.tp * pair.pp)
            search = pair.rollout_tp, pair.rollout_pp, pair.searching // (pair.rollout_tp * pair.rollout_pp)
            tested.add(((pair.tp, pair.pp, replicas, pair.sequence_parallel), search))
    assert tested == wanted


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Result]:
    """On policy, by kind of head: the folder with the weights after three steps, and what was logged and rolled out."""
    made = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("one")
        made[tied] = folder, train(Pair(tied=tied), folder)
    return made


@pytest.fixture(scope="module")
def one_version_behind(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Two models in one process: one learns, the other searches with the weights that the first had a step before."""
    folder, catalog, rl = tmp_path_factory.mktemp("behind"), small_catalog(), RL_AHEAD
    runtime.initialize(ModelConfig(), seed=1)
    learning, searching = (build_model(SHAPE, ModelConfig(), seed=3) for _ in range(2))
    engine = RolloutEngine(MegatronLM(searching, SHAPE), catalog, RolloutConfig(), seed=5)
    actor = Actor(Trainable(learning, SHAPE, TrainerConfig(), lr=LR), catalog, rl, DataParallel())
    reference = build_reference("copy", rl.beta, learning, lambda: build_model(SHAPE, ModelConfig(), seed=3))
    rolled_out, stats = [], []
    for step in range(STEPS):
        before = {name: value.detach().clone() for name, value in learning.named_parameters()}
        batch = prompts(step, DataParallel())
        rollout = engine.generate(batch, rl.group_size, negatives="beam", policy_space="trie", step=step)
        adv_BG = group_advantages(RankingReward()(rollout))
        omega_BG = candidate_weights(rl, rollout)
        packed = actor.pack(rollout, adv_BG, omega_BG)
        ref = reference.logprobs([part.batch for part in packed])
        stats.append(actor.update(rollout, packed, adv_BG, omega_BG, ref, lr=LR))
        rolled_out.append(facts(rollout, DataParallel()))
        with torch.no_grad():
            for name, parameter in searching.named_parameters():
                parameter.copy_(before[name])
    save_hf(learning, SHAPE, folder)
    return folder, {"stats": stats, "rollouts": rolled_out}


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 3, pytest.param(4, marks=pytest.mark.full)])
def test_separate_rollouts_equal_one_process(
    processes: int, one_process: dict[bool, Result], one_version_behind: Result, tmp_path: Path
) -> None:
    jobs = JOBS[processes]
    launch(WORKER, processes, options_of(jobs), str(tmp_path), "anew", folder=tmp_path, limit=500)
    for number, pair in enumerate(jobs):
        got = json.loads((tmp_path / f"{number}.json").read_text())
        folder, expected = one_version_behind if pair.ahead else one_process[pair.tied]
        if pair.ahead:
            assert [step["rl/staleness"] for step in got["stats"]] == [0.0, 1.0, 1.0], pair.name
            assert_same_learning(got, expected, pair.name)
        else:
            assert_same(got, expected, pair.name)
        ours, theirs = weights(tmp_path / str(number)), weights(folder)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (ours[key] - value).abs().max() <= WEIGHT_ABSOLUTE, (pair.name, key)


def assert_same_learning(got: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Candidates and everything that the update says; the worker's last rollout is none of a step."""
    for step, (have, want) in enumerate(zip(got["stats"], expected["stats"], strict=True)):
        for key, value in want.items():
            ours = have[key if key == "grad_norm" else f"rl/{key}"]
            close = math.isclose(ours, value, rel_tol=STATISTIC_RELATIVE, abs_tol=STATISTIC_ABSOLUTE)
            assert close, (name, step, key, ours, value)
    for have, want in zip(got["rollouts"][:STEPS], expected["rollouts"], strict=True):
        assert have["items"] == want["items"], name


def test_old_weights_matter(one_version_behind: Result, tmp_path: Path) -> None:
    """Guards the comparison above: the same three steps on policy end elsewhere, and the ratio sees the difference."""
    folder, behind = one_version_behind
    shifts = [step["shift_kl"] for step in behind["stats"]]
    assert shifts[0] < 1e-8 < 10 * STATISTIC_ABSOLUTE < min(shifts[1:])
    on_policy = train(Pair(ahead=1, searching=0), tmp_path)
    assert on_policy["stats"][1]["rl/shift_kl"] < 1e-8
    ours, theirs = weights(tmp_path), weights(folder)
    assert max((ours[key] - value).abs().max() for key, value in theirs.items()) > 10 * WEIGHT_ABSOLUTE
