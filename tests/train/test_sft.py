"""Early stopping: what counts as progress, what stays the best, when SFT ends."""

from types import SimpleNamespace

import pytest

from tawin_nemo.config import Recipe, SftConfig
from tawin_nemo.train import sft
from tawin_nemo.train.stage import Progress


@pytest.mark.parametrize(
    ("losses", "min_delta", "best_step", "bad_checks"),
    [
        ([3.0, 2.0, 1.0], 0.0, 2, 0),
        ([3.0, 2.0, 2.5], 0.0, 1, 1),
        ([3.0, 2.0, 2.5, 2.1], 0.0, 1, 2),
        # better by less than min_delta: the best so far, yet no progress
        ([3.0, 2.0, 1.95], 0.1, 2, 1),
        ([3.0, 2.0, 1.95, 1.92], 0.1, 3, 2),
    ],
)
def test_checks(monkeypatch, losses, min_delta, best_step, bad_checks):
    written: list[float] = []
    saved: list[int] = []
    stage = SimpleNamespace(
        name="sft",
        write=lambda step, metrics: written.append(metrics["valid/loss"]),
        save=lambda trainable, done: saved.append(done.best_step),
    )
    world = SimpleNamespace(recipe=Recipe(sft=SftConfig(min_delta=min_delta)))
    done, values = Progress(), iter(losses)
    monkeypatch.setattr(sft, "valid_loss", lambda world, trainable: next(values))
    for step in range(len(losses)):
        done.step = step
        sft._check(world, stage, None, done)
    assert (done.best_step, done.bad_checks) == (best_step, bad_checks)
    assert written == losses
    assert saved[-1] == best_step
