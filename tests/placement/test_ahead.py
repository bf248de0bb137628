"""The rollout that waits for the next step: which version it must have, and that a checkpoint keeps it exactly."""

import json

import pytest
import torch

from tawin_nemo.placement.ahead import RolloutAhead
from tawin_nemo.types import Rollout
from tawin_nemo.util.errors import CheckpointError, TawinError
from tests.train.actor_scene import PLAIN, Scene


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return Scene(PLAIN, targets=False).rollout


def waiting(rollout: Rollout, *, version: int, rows: list[int]) -> RolloutAhead:
    """A replica whose prompts are ``rows`` of the rollout, after a restart."""
    made = RolloutAhead(engine=object(), total=9)
    first = RolloutAhead(engine=object(), total=9)
    first._waiting = Rollout(**{**vars(rollout), "weight_version": version})
    made.restore(json.loads(json.dumps(first.state())), rollout.prompts.take(torch.tensor(rows, dtype=torch.long)))
    return made


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [4, 1], []])
def test_every_replica_finds_its_groups_in_the_checkpoint(rollout, rows):
    found, index = waiting(rollout, version=3, rows=rows).take(4), torch.tensor(rows, dtype=torch.long)
    assert found.weight_version == 3
    assert found.prompts.row_B.tolist() == rows
    assert torch.equal(found.prompts.target_B, rollout.prompts.target_B[index])
    for name in ("items_BG", "tokens_BGT", "lengths_BG", "scores_BG", "logprobs_BGT", "is_target_BG"):
        have, want = getattr(found, name), getattr(rollout, name)[index]
        assert have.dtype == want.dtype, name
        assert torch.equal(have, want), name
    assert [found.prompts.prompts[i].tolist() for i in range(len(rows))] == [
        rollout.prompts.prompts[row].tolist() for row in rows
    ]


@pytest.mark.parametrize("version", [0, 2, 4, 5])
def test_exactly_one_version_behind_is_accepted(rollout, version):
    with pytest.raises(TawinError, match=rf"weight version {version} where version 3 is due"):
        waiting(rollout, version=version, rows=[0]).take(4)


def test_a_step_that_finds_nothing_is_an_error_but_for_the_first(rollout):
    ahead = waiting(rollout, version=0, rows=[0])
    assert ahead.take(0) is None
    assert ahead.take(1) is not None
    with pytest.raises(TawinError, match="nothing was searched ahead for step 1"):
        ahead.take(1)


def test_a_rollout_without_its_own_logprobs_is_refused(rollout):
    unknown = rollout.logprobs_BGT.clone()
    unknown[0, 0, 0] = torch.nan
    ahead = waiting(Rollout(**{**vars(rollout), "logprobs_BGT": unknown}), version=3, rows=[0])
    with pytest.raises(TawinError, match="without its own log-probs"):
        ahead.take(4)


def test_other_data_than_the_checkpoint_saw_are_refused(rollout):
    first = RolloutAhead(engine=object(), total=9)
    first._waiting = rollout
    other = rollout.prompts.take(torch.tensor([0]))
    other.row_B[0] = 77
    with pytest.raises(CheckpointError, match="other rows than the data"):
        RolloutAhead(engine=object(), total=9).restore(first.state(), other)


def test_on_policy_nothing_waits_and_nothing_is_logged(rollout):
    ahead = RolloutAhead()
    assert ahead.take(5) is None
    assert ahead.staleness(rollout, step=5) == {}
    assert ahead.state() == {}
