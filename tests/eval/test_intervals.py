"""Intervals and paired differences: formulas by hand, coverage by simulation."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from tawin_nemo.eval.intervals import (
    bootstrap_interval,
    minimal_detectable_effect,
    normal_interval,
    paired_difference,
    share_interval,
)

Z95, Z80 = 1.959964, 0.841621  # quantiles of the normal distribution at 0.975 and 0.8


def test_normal_interval_by_hand() -> None:
    interval = normal_interval(np.array([0.0, 0.0, 0.0, 1.0]))
    half = Z95 * math.sqrt((3 * (1 / 4) ** 2 + (3 / 4) ** 2) / 3) / math.sqrt(4)
    assert interval.mean == 1 / 4
    assert (interval.low, interval.high) == pytest.approx((1 / 4 - half, 1 / 4 + half), abs=1e-6)
    assert normal_interval(np.array([0.7])).low == 0.7
    with pytest.raises(ValueError, match="no values"):
        normal_interval(np.zeros(0))


@pytest.mark.parametrize("method", [normal_interval, bootstrap_interval])
def test_about_95_of_100_intervals_hold_the_truth(method) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(1)
    samples = rng.random((300, 200)) < 0.3
    found = [method(row.astype(float)) for row in samples]
    held = [interval.low <= 0.3 <= interval.high for interval in found]
    assert 0.90 <= np.mean(held) <= 0.985  # standard error of 300 draws: 0.013


def test_bootstrap_equals_resampling_by_hand() -> None:
    """The multinomial shortcut has the quantiles of drawing users with replacement."""
    rng = np.random.default_rng(2)
    values_B = rng.choice([0.0, 0.5, 0.63, 1.0], size=150, p=[0.6, 0.2, 0.1, 0.1])
    drawn = values_B[rng.integers(0, 150, (20_000, 150))].mean(axis=1)
    interval = bootstrap_interval(values_B, resamples=20_000)
    assert interval.mean == values_B.mean()
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.003)


def test_bootstrap_is_seeded_and_does_not_depend_on_the_memory_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    values_B = np.random.default_rng(3).random(50)
    first = bootstrap_interval(values_B, resamples=500, seed=4)
    assert first == bootstrap_interval(values_B, resamples=500, seed=4)
    assert first != bootstrap_interval(values_B, resamples=500, seed=5)
    monkeypatch.setattr("tawin_nemo.eval.intervals._CHUNK", 70 * 50)
    chunked = bootstrap_interval(values_B, resamples=500, seed=4)
    assert (first.mean, first.low, first.high) == pytest.approx((chunked.mean, chunked.low, chunked.high))


def test_pairing_sees_what_two_intervals_cannot() -> None:
    rng = np.random.default_rng(6)
    theirs_B = (rng.random(4000) < 0.3).astype(float)
    ours_B = np.where(rng.random(4000) < 0.01, 1.0, theirs_B)  # a gain of 0.007 in truth
    difference = paired_difference(ours_B, theirs_B)
    assert difference.mean == pytest.approx(np.mean(ours_B) - np.mean(theirs_B))
    assert difference.excludes_zero
    assert normal_interval(ours_B).low < normal_interval(theirs_B).high  # the two intervals overlap
    same = paired_difference(theirs_B, theirs_B)
    assert (same.mean, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)
    with pytest.raises(ValueError, match="4000 rows against 3999"):
        paired_difference(ours_B, theirs_B[1:])


def test_minimal_detectable_effect() -> None:
    differences_B = np.array([1.0, -1.0, 1.0, -1.0])
    expected = (Z95 + Z80) * math.sqrt(4 / 3) / math.sqrt(4)
    assert minimal_detectable_effect(differences_B) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="at least 2 rows"):
        minimal_detectable_effect(np.zeros(1))


def test_an_effect_of_the_detectable_size_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(7)
    effect = minimal_detectable_effect(rng.normal(0, 1, 400))
    found = [normal_interval(rng.normal(effect, 1, 400)).low > 0 for _ in range(400)]
    assert 0.73 <= np.mean(found) <= 0.87  # standard error 0.02


def test_shares_stay_between_0_and_1_on_small_data() -> None:
    """Each against the exact binomial probabilities: Wilson's limits hold at least 90 % for small numbers of users."""
    z = NormalDist().inv_cdf(0.975)
    for users in range(2, 60):
        for hits in range(users + 1):
            values_B = np.r_[np.ones(hits), np.zeros(users - hits)]
            found, normal = share_interval(values_B), normal_interval(values_B)
            assert 0 <= found.low <= found.mean <= found.high <= 1
            if 0 <= normal.low < normal.high <= 1:
                assert found == normal
                continue
            assert found.low < found.high
            for limit in (found.low, found.high):  # Wilson: the limits are the shares that z deviations exclude
                if 0 < limit < 1:
                    assert abs(found.mean - limit) == pytest.approx(z * (limit * (1 - limit) / users) ** 0.5)
    assert share_interval(np.zeros(20)).high > 0.1
    assert share_interval(np.ones(20)).low < 0.9


def test_shares_of_large_data_are_what_they_were() -> None:
    values_B = np.random.default_rng(0).random(5000) < 0.07
    assert share_interval(values_B.astype(float)) == normal_interval(values_B.astype(float))
    ndcg_B = values_B / np.log2(2 + np.arange(5000) % 3)
    assert share_interval(ndcg_B) == normal_interval(ndcg_B)
    one = np.array([1.0])
    assert share_interval(one) == normal_interval(one)
    beyond = np.array([-1.0, 0.0, 3.0])
    assert share_interval(beyond) == normal_interval(beyond)
