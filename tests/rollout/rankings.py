"""Comparison of ranked (path, score) lists."""

from __future__ import annotations

import math

import numpy as np

from tawin_nemo.types import NO_ITEM, Candidates

#: Token path and score of each result of one prompt, best first.
Ranking = list[tuple[tuple[int, ...], float]]

SCORE_TOLERANCE = 1e-4  # float32: log-probs of up to some dozen tokens, from two different attention paths
EXACT = 1e-9  # float64


def rounding(path: tuple[int, ...], score: float) -> float:
    """How far two float32 sums of one path's log-probs may lie apart because each rounds after every token.

    One addition is off by 0.29 steps of float32 at the score's size (standard deviation, at most), two sums of n by
    0.41 sqrt(n); sqrt(n) steps are allowed. 74 tokens and -665 nats: 9 steps of 6e-5, where single runs are seen to be
    3 steps off the float64 value and 2 apart. Log-probs that differ themselves are what the caller's tolerance is for.
    """
    return math.sqrt(len(path)) * float(np.spacing(np.float32(abs(score))))


def found_ranking(candidates: Candidates, row: int) -> Ranking:
    """The valid candidates of one prompt."""
    columns = (candidates.tokens_BWT, candidates.lengths_BW, candidates.scores_BW, candidates.items_BW)
    return [
        (tuple(tokens[:length].tolist()), float(score))
        for tokens, length, score, item in zip(*(column[row] for column in columns), strict=True)
        if item != NO_ITEM
    ]


def assert_same_ranking(ours: Ranking, theirs: Ranking, tolerance: float) -> None:
    """Same scores place by place and same paths, in float64 without any excuse.

    In float32 a score may be off by the tolerance or by what rounding does to a sum of its size, whichever is more;
    paths may be swapped among scores as close as that, and such a tie at the last place may let another path in.
    """
    assert len(ours) == len(theirs)
    single = tolerance > EXACT
    scores = np.array([score for _, score in theirs])
    slack = np.array([max(tolerance, rounding(path, score) if single else 0.0) for path, score in theirs])
    apart = np.abs(np.array([score for _, score in ours]) - scores)
    assert (apart <= slack).all(), (ours, theirs, slack)
    for (path, score), (expected, _) in zip(ours, theirs, strict=True):
        if path != expected:
            tied = {other for (other, value), near in zip(theirs, slack, strict=True) if abs(value - score) < near}
            assert single, (path, expected)
            assert path in tied or abs(score - scores[-1]) < slack[-1], (path, expected, score)
