"""The benchmark of sequence training: both sides have the same targets, and a part of an epoch counts as the whole."""

import pytest

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.parallel import runtime
from tests.benchmarks import harness
from tests.benchmarks.sequence_training import LOSSES, Side, disagreement, interactions, seconds_per_epoch


@pytest.fixture(scope="module")
def samples():
    runtime.initialize(ModelConfig(), seed=0)
    return interactions(users=24, per_user=9, items=40)


def test_both_sides_have_the_same_targets_and_losses(samples):
    assert len(samples) == 24 * 8
    sides = [Side.of(samples, 40, training=name, loss="softmax", batch_size=8) for name in ("windows", "sequences")]
    assert [side.steps for side in sides] == [24, 3]
    assert sides[1].rows.num_targets == len(sides[0].rows)
    assert disagreement(samples, 40) < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_a_part_of_an_epoch_is_scaled_to_the_epoch(samples, loss, monkeypatch):
    monkeypatch.setattr(harness, "SHORTEST_SAMPLE", 0.0)
    ran = []
    side = Side.of(samples, 40, training="windows", loss=loss, batch_size=8)
    monkeypatch.setattr(Side, "begin_epoch", lambda _, steps: ran.append(steps))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(sum(ran)))  # a second per step
    timed = seconds_per_epoch({"windows": side}, part=4, repeats=2)
    assert ran == [5, 6, 6]
    assert timed["windows"].samples == [24.0, 24.0]
