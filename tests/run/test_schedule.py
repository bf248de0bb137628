"""Learning-rate schedules at their corners."""

import math

import pytest

from tawin_nemo.run.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 1 / 4),
        ("constant", 3, 4 / 4),
        ("constant", 500, 1.0),
        ("linear", 4, 1.0),
        ("linear", 54, 0.1 + 0.9 * (1 - 50 / 100)),
        ("linear", 104, 0.1),
        ("cosine", 54, 0.1 + 0.9 * 0.5),
        ("cosine", 29, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 25 / 100))),
        ("cosine", 900, 0.1),
    ],
)
def test_corners(schedule, step, expected):
    rate = learning_rate(step, peak=1.0, schedule=schedule, warmup=4, total=104, min_ratio=0.1)
    assert math.isclose(rate, expected, rel_tol=1e-12)
