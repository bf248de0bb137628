"""Paired tests over seeds and users against slow oracles: every draw by hand, every sign flip, every subset."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tawin_nemo.eval import intervals, paired
from tawin_nemo.eval.intervals import minimal_detectable_effect, resampled_means
from tawin_nemo.eval.paired import (
    best_shares,
    hierarchical_interval,
    holm,
    metric_values,
    paired_test,
    parse_metric,
    sign_flip_p,
)
from tawin_nemo.util.errors import ConfigError, DataError


def crossed(
    rng: np.random.Generator, seeds: int, users: int, *, seed: float, user: float, noise: float, mean: float = 0.0
) -> np.ndarray:
    """values_SB of a crossed design with the given standard deviations."""
    seed_S1 = rng.normal(0, seed, (seeds, 1))
    user_1B = rng.normal(0, user, (1, users))
    return mean + seed_S1 + user_1B + rng.normal(0, noise, (seeds, users))


# -- metrics from ranks --------------------------------------------------------------------------------------------
@given(ranks=st.lists(st.integers(-1, 60), min_size=1, max_size=30), k=st.integers(1, 50), share=st.integers(1, 4))
def test_metrics_are_those_of_the_definition(ranks: list[int], k: int, share: int) -> None:
    rank_B, sharing_B = np.array(ranks), np.full(len(ranks), share)
    hits = [1.0 if 0 <= rank < k else 0.0 for rank in ranks]
    gains = [hit / math.log2(rank + 2) if hit else 0.0 for hit, rank in zip(hits, ranks, strict=True)]
    assert metric_values(f"recall@{k}", rank_B).tolist() == hits
    assert metric_values(f"ndcg@{k}", rank_B).tolist() == pytest.approx(gains, abs=1e-12)
    assert metric_values(f"recall@{k}", rank_B, sharing_B).tolist() == pytest.approx([hit / share for hit in hits])


@pytest.mark.parametrize("name", ["recall", "recall@", "recall@0", "recal@3", "mrr@3", "recall@x", "ndcg@-1"])
def test_an_unknown_metric_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="write recall@K or ndcg@K"):
        parse_metric(name)


# -- seeds and users resampled -------------------------------------------------------------------------------------
def drawn_by_hand(values_SB: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    seeds, users = values_SB.shape
    found = []
    for _ in range(resamples):
        picked_S, picked_B = rng.integers(0, seeds, seeds), rng.integers(0, users, users)
        found.append(values_SB[np.ix_(picked_S, picked_B)].mean())
    return np.array(found)


def test_the_interval_equals_drawing_seeds_and_users_by_hand() -> None:
    rng = np.random.default_rng(1)
    values_SB = np.round(crossed(rng, 3, 40, seed=0.4, user=1.0, noise=1.0), 1)
    slow = drawn_by_hand(values_SB, 20_000, rng)
    fast = hierarchical_interval(values_SB, resamples=20_000)
    assert fast.mean == pytest.approx(values_SB.mean())
    assert (fast.low, fast.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=0.02)
    wide = hierarchical_interval(values_SB, 0.99, resamples=20_000)
    assert wide.low < fast.low < fast.high < wide.high


def test_the_variance_is_what_the_text_says() -> None:
    """(1 - 1/S) seed^2/S + user^2/B + (3 - 2/S) noise^2/(SB), up to 1/B, on average over data sets."""
    seeds, users, sd_seed, sd_user, sd_noise = 3, 50, 0.3, 1.0, 2.0
    rng = np.random.default_rng(2)
    found = []
    for number in range(300):
        values_SB = crossed(rng, seeds, users, seed=sd_seed, user=sd_user, noise=sd_noise)
        means_RS = resampled_means(values_SB, 400, np.random.default_rng([number, 0]))
        found.append(((means_RS * paired._seed_shares(seeds, 400, number)).sum(1)).var())
    expected = (1 - 1 / seeds) * sd_seed**2 / seeds + sd_user**2 / users
    expected += (3 - 2 / seeds) * sd_noise**2 / (seeds * users)
    assert np.mean(found) == pytest.approx(expected, rel=0.08)


def test_95_of_100_intervals_hold_the_truth_where_users_alone_do_not() -> None:
    rng = np.random.default_rng(3)
    held, held_users = [], []
    for _ in range(300):
        values_SB = crossed(rng, 4, 60, seed=0.3, user=1.0, noise=1.0, mean=0.7)
        both = hierarchical_interval(values_SB, resamples=1000)
        users = hierarchical_interval(values_SB.mean(0, keepdims=True), resamples=1000)
        held.append(both.low <= 0.7 <= both.high)
        held_users.append(users.low <= 0.7 <= users.high)
    assert 0.90 <= np.mean(held) <= 0.99  # standard error of 300 draws: 0.013
    assert np.mean(held_users) < 0.88  # sqrt(0.0208 / 0.0433) of the width it would need: 83 %


def test_one_seed_means_users_alone() -> None:
    values_SB = (np.random.default_rng(4).random((1, 300)) < 0.2).astype(float)
    interval = hierarchical_interval(values_SB, resamples=20_000)
    half = 1.96 * values_SB.std(ddof=1) / math.sqrt(300)
    assert (interval.low, interval.high) == pytest.approx((interval.mean - half, interval.mean + half), abs=0.006)
    with pytest.raises(ValueError, match="no values"):
        hierarchical_interval(np.zeros((2, 0)))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 30))
def test_the_order_of_users_does_not_matter(number: int, seeds: int, users: int) -> None:
    rng = np.random.default_rng(number)
    values_SB = rng.choice([0.0, 0.5, 1.0], (seeds, users))
    other_SB = values_SB[:, rng.permutation(users)]
    assert hierarchical_interval(values_SB, resamples=50) == hierarchical_interval(other_SB, resamples=50)
    assert sign_flip_p(values_SB[0] - 0.5, resamples=50) == sign_flip_p(other_SB[0] - 0.5, resamples=50)


def test_the_interval_does_not_depend_on_the_memory_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    values_SB = np.random.default_rng(5).random((3, 40))
    first = hierarchical_interval(values_SB, resamples=500, seed=6)
    monkeypatch.setattr(intervals, "_CHUNK", 70 * 40)
    second = hierarchical_interval(values_SB, resamples=500, seed=6)
    assert (first.low, first.high) == pytest.approx((second.low, second.high))
    assert first != hierarchical_interval(values_SB, resamples=500, seed=7)


# -- the paired test -----------------------------------------------------------------------------------------------
def test_a_paired_test_by_hand() -> None:
    theirs_SB = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    ours_SB = np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    found = paired_test(ours_SB, theirs_SB)
    assert found.per_seed == (0.25, 0.0)
    assert found.difference.mean == 0.125
    mean_B = np.array([1.0, 0.0, -0.5, 0.0])
    assert found.detectable == pytest.approx(minimal_detectable_effect(mean_B))
    assert found.p == pytest.approx(1.0)  # |1 - .5| is the smallest of the four sums |+-1 +-.5|
    with pytest.raises(DataError, match="same seeds and the same users"):
        paired_test(ours_SB, theirs_SB[:, :3])


def test_no_difference_is_no_evidence() -> None:
    values_SB = (np.random.default_rng(8).random((3, 50)) < 0.3).astype(float)
    found = paired_test(values_SB, values_SB)
    assert (found.difference.mean, found.difference.low, found.difference.high, found.p) == (0, 0, 0, 1)
    assert not found.difference.excludes_zero


def test_pairing_over_seeds_finds_a_small_gain() -> None:
    rng = np.random.default_rng(9)
    theirs_SB = np.broadcast_to(rng.random(4000) < 0.2, (3, 4000)).astype(float)
    ours_SB = np.where(rng.random((3, 4000)) < 0.01, 1.0, theirs_SB)  # a gain of 0.008 in truth
    found = paired_test(ours_SB, theirs_SB)
    assert found.difference.excludes_zero
    assert found.difference.low < 0.008 < found.difference.high
    assert found.p < 0.001
    assert hierarchical_interval(ours_SB).low < hierarchical_interval(theirs_SB).high  # unpaired, they overlap


# -- sign flips ----------------------------------------------------------------------------------------------------
@settings(max_examples=20)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=9))
def test_sign_flips_equal_trying_all_of_them(differences: list[float]) -> None:
    observed = abs(sum(differences))
    flips = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    exact = np.mean([flip >= observed - 1e-9 for flip in flips])
    assert sign_flip_p(np.array(differences), resamples=20_000) == pytest.approx(exact, abs=0.015)


def test_sign_flips_and_users_agree_with_scipy() -> None:
    """scipy draws every user; ours draws distinct values only. Limits and p-value agree up to resampling noise."""
    rng = np.random.default_rng(13)
    theirs_B = rng.choice([0.0, 0.63, 1.0], 300, p=[0.7, 0.2, 0.1])
    differences_B = np.where(rng.random(300) < 0.1, 1.0, theirs_B) - theirs_B - 0.07
    flips = stats.permutation_test(
        (differences_B,), lambda x, axis: np.mean(x, axis=axis), permutation_type="samples", n_resamples=10_000,
        vectorized=True, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert 0.01 < flips.pvalue < 0.5
    assert sign_flip_p(differences_B) == pytest.approx(flips.pvalue, abs=0.02)
    users = stats.bootstrap(
        (differences_B,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found = hierarchical_interval(differences_B[None])
    assert (found.low, found.high) == pytest.approx((users.low, users.high), abs=0.002)


def test_a_p_value_is_never_zero_and_uniform_without_an_effect() -> None:
    assert sign_flip_p(np.ones(100), resamples=999) == 1 / 1000
    rng = np.random.default_rng(10)
    found = [sign_flip_p(rng.normal(0, 1, 40), resamples=400, seed=i) for i in range(400)]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)


# -- families ------------------------------------------------------------------------------------------------------
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferronis(p_values: list[float]) -> None:
    """A hypothesis falls when every family that holds it falls; Bonferroni tests a family by its smallest p."""
    indices = range(len(p_values))
    families = [set(f) for size in range(1, len(p_values) + 1) for f in itertools.combinations(indices, size)]
    expected = [
        min(1.0, max(len(family) * min(p_values[i] for i in family) for family in families if index in family))
        for index in indices
    ]
    assert holm(p_values) == pytest.approx(expected)


def test_holm_of_nothing() -> None:
    assert holm([]) == []


# -- the best of several settings ----------------------------------------------------------------------------------
def test_best_shares_equal_drawing_by_hand() -> None:
    rng = np.random.default_rng(11)
    values_XSB = np.stack([np.round(crossed(rng, 2, 30, seed=0.1, user=1, noise=1, mean=m), 1) for m in (0, 0.1, 0.2)])
    wins = np.zeros(3)
    for _ in range(8000):
        picked_S, picked_B = rng.integers(0, 2, 2), rng.integers(0, 30, 30)
        wins[np.argmax(values_XSB[:, picked_S][:, :, picked_B].mean((1, 2)))] += 1
    shares_X = best_shares(values_XSB, resamples=8000)
    assert shares_X.sum() == pytest.approx(1)
    assert shares_X.tolist() == pytest.approx((wins / 8000).tolist(), abs=0.025)


def test_equal_settings_share_the_win() -> None:
    values_SB = np.random.default_rng(12).random((2, 20))
    assert best_shares(np.stack([values_SB, values_SB, values_SB - 1])).tolist() == pytest.approx([0.5, 0.5, 0.0])
