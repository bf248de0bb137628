"""Comparison of ranked (path, score) lists."""

from __future__ import annotations

import numpy as np

from tawin_nemo.types import NO_ITEM, Candidates

#: Token path and score of each result of one prompt, best first.
Ranking = list[tuple[tuple[int, ...], float]]

SCORE_TOLERANCE = 1e-4  # float32: log-probs of up to some dozen tokens, from two different attention paths
EXACT = 1e-9  # float64


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

    In float32 paths may be swapped among scores closer than the tolerance; such a tie at the last place may let
    another path in.
    """
    assert len(ours) == len(theirs)
    scores = np.array([score for _, score in theirs])
    np.testing.assert_allclose([score for _, score in ours], scores, rtol=0, atol=tolerance)
    for (path, score), (expected, _) in zip(ours, theirs, strict=True):
        if path != expected:
            tied = {other for other, value in theirs if abs(value - score) < tolerance}
            assert tolerance > EXACT, (path, expected)
            assert path in tied or abs(score - scores[-1]) < tolerance, (path, expected, score)
