"""Paired tests of two ways of training, over several seeds and the same users, from the ranks of the targets alone.

``values_SB`` is a metric of user b under the run of seed s. All seeds are evaluated on the same users, so seeds and
users are *crossed*: a run is good or bad for all users (seed effect), a user is easy or hard for every run (user
effect), and now and then one user is hit under one seed and not under another (noise).

The default interval resamples both: seeds with replacement and, independently, users with replacement, every drawn
seed evaluated on the same drawn users (the pigeonhole bootstrap, A. Owen, Annals of Applied Statistics 1 (2007)
386-411). It asks "what if we trained again and met other users?"; resampling users alone would ask about these very
weights. Its expected variance, against the true ``seed^2/S + user^2/B + noise^2/(SB)``:

    (1 - 1/S) seed^2/S + user^2/B + (3 - 2/S) noise^2/(SB)

so it is too wide by the noise and too narrow by 1/S of the seed effect. With three seeds it errs to the wide side as
long as the seed effect's standard deviation is below twice ``noise/sqrt(B)``; therefore the differences of the single
seeds stand beside every interval.

Why numpy and not scipy.stats (1.17; 3 seeds x 9,000 users, 10,000 resamples, 2 CPU cores): ``bootstrap`` resamples
one factor only; ``permutation_test`` gives the same p-value up to noise (0.622 against 0.623) in 48 s instead of
0.2 s, and a results page holds hundreds of tests. scipy has no Holm correction. ``tests/eval/test_paired.py`` compares
all of them with scipy and with plain loops.

Axis letters: S seeds, B users, U distinct magnitudes, R resamples, X settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tawin_nemo.eval.intervals import (
    DECIMALS,
    Interval,
    bootstrap_interval,
    chunks,
    minimal_detectable_effect,
    percentile_interval,
    resampled_means,
)
from tawin_nemo.maths.ranking import ndcg_at_k, recall_at_k
from tawin_nemo.util.errors import ConfigError, DataError

_METRICS = {"recall": recall_at_k, "ndcg": ndcg_at_k}


@dataclass(frozen=True)
class PairedTest:
    """Estimate, interval and p-value of the mean of ``ours - theirs``."""

    difference: Interval  # seeds and users resampled; users alone when there is one seed
    per_seed: tuple[float, ...]  # mean difference of each seed
    p: float  # two-sided, sign flips of the users' differences (mean over seeds); seeds are taken as fixed
    detectable: float  # smallest true difference found with a power of 80 %, from the users' standard deviation


#: Values of each row that further evaluations measure (eval.candidates, eval.auc, eval.grounding), which no rank gives.
MEASURED = ("hit_ratio@1", "valid_ratio", "trie_hit_ratio@1", "auc", "opauc@10", "opauc@50", "wpauc", "named_ratio")
#: What the names of those of eval.grounding begin with.
GROUNDED = "grounded_"


def is_measured(name: str) -> bool:
    """Whether a metric is a column of a further evaluation: one of ``MEASURED``, or ``grounded_recall@K`` and so on."""
    return name in MEASURED or name.startswith(GROUNDED)


def check_metric(name: str) -> None:
    """Raises ConfigError for a name that is neither ``recall@K``, ``ndcg@K``, these with ``grounded_`` in front, nor
    one of ``MEASURED``."""
    if name not in MEASURED:
        parse_metric(name.removeprefix(GROUNDED))


def parse_metric(name: str) -> tuple[str, int]:
    """``recall@3`` -> ("recall", 3). Raises ConfigError for anything else.

    >>> parse_metric("ndcg@10")
    ('ndcg', 10)
    """
    kind, _, cutoff = name.partition("@")
    if kind not in _METRICS or not cutoff.isdigit() or int(cutoff) < 1:
        raise ConfigError(f"metric {name!r} is not known; write recall@K or ndcg@K with K >= 1")
    return kind, int(cutoff)


def metric_values(name: str, rank_B: np.ndarray, sharing_B: np.ndarray | None = None) -> np.ndarray:
    """``recall@K`` or ``ndcg@K`` of each user from the 0-based rank of its target (-1 = not listed). [B] float64.

    ``sharing_B`` counts the items on the target's token path; with it a hit is worth 1/sharing, without it 1.

    Raises ConfigError for an unknown metric.

    >>> metric_values("recall@2", np.array([0, 1, 2, -1]), np.array([1, 2, 1, 1])).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """
    kind, k = parse_metric(name)
    values_B = _METRICS[kind](torch.from_numpy(np.array(rank_B, dtype=np.int64)), k).numpy()
    return values_B if sharing_B is None else values_B / sharing_B


def hierarchical_interval(
    values_SB: np.ndarray, level: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile interval of the mean over seeds and users, both resampled (see the module's text).

    One seed alone gives the bootstrap over users. Raises ValueError when there are no values.
    """
    seeds, users = values_SB.shape
    if seeds == 0 or users == 0:
        raise ValueError("the mean of no values does not exist")
    if seeds == 1:
        return bootstrap_interval(values_SB[0], level, resamples=resamples, seed=seed)
    means_RS = resampled_means(values_SB, resamples, np.random.default_rng([seed, 0]))
    estimates_R = (means_RS * _seed_shares(seeds, resamples, seed)).sum(1)
    return percentile_interval(float(values_SB.mean()), estimates_R, level)


def paired_test(
    ours_SB: np.ndarray, theirs_SB: np.ndarray, level: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> PairedTest:
    """Everything about ``ours - theirs``; row s of both belongs to one seed, column b to one user.

    Raises DataError when the two differ in shape or have fewer than two users.
    """
    if ours_SB.shape != theirs_SB.shape or ours_SB.shape[1] < 2:
        raise DataError(
            f"a paired test needs the same seeds and the same users (at least 2): {ours_SB.shape} (seeds, users) "
            f"against {theirs_SB.shape}; evaluate both on the same split with the same limits"
        )
    differences_SB = np.round(ours_SB - theirs_SB, DECIMALS)
    mean_B = differences_SB.mean(0)
    return PairedTest(
        difference=hierarchical_interval(differences_SB, level, resamples=resamples, seed=seed),
        per_seed=tuple(differences_SB.mean(1).tolist()),
        p=sign_flip_p(mean_B, resamples=resamples, seed=seed),
        detectable=minimal_detectable_effect(mean_B, level=level),
    )


def sign_flip_p(differences_B: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided permutation p-value of a mean of 0: each user's difference could as well have had the other sign.

    ``(1 + number of flips with |sum| >= |observed sum|) / (1 + resamples)``, never 0. The sum of n equal magnitudes
    with random signs is binomial, so only distinct magnitudes are drawn.
    """
    rounded_B = np.round(differences_B, DECIMALS)
    magnitude_U, count_U = np.unique(np.abs(rounded_B[rounded_B != 0]), return_counts=True)
    observed = abs(float(rounded_B.sum()))
    rng = np.random.default_rng(seed)
    extreme = 0
    for size in chunks(resamples, len(magnitude_U)):
        signs_RU = 2 * rng.binomial(count_U, 0.5, (size, len(count_U))) - count_U
        extreme += int((np.abs(signs_RU @ magnitude_U) >= observed - 1e-9).sum())
    return (1 + extreme) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: below 0.05 = significant at 5 % over the whole family. In the order given.

    >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
    [0.06, 0.03, 0.06]
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def best_shares(values_XSB: np.ndarray, *, resamples: int = 2_000, seed: int = 0) -> np.ndarray:
    """How often each of X settings has the highest mean when seeds and users are resampled. [X], sums to 1.

    All settings see the same draws, so what they have in common does not blur the choice; ties are shared.
    """
    settings, seeds, users = values_XSB.shape
    flat_CB = values_XSB.reshape(settings * seeds, users)
    means_RXS = resampled_means(flat_CB, resamples, np.random.default_rng([seed, 0]))
    shares_RS = _seed_shares(seeds, resamples, seed)
    means_RX = (means_RXS.reshape(resamples, settings, seeds) * shares_RS[:, None, :]).sum(2)
    best_RX = means_RX >= means_RX.max(1, keepdims=True) - 1e-12
    return np.asarray((best_RX / best_RX.sum(1, keepdims=True)).mean(0))


def _seed_shares(seeds: int, resamples: int, seed: int) -> np.ndarray:
    """Weight of each seed when as many seeds are drawn with replacement. [R, S]."""
    return np.random.default_rng([seed, 1]).multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
