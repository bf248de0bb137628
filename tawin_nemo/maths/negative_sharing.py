"""Rejected answers shared inside a group of rows (NAPO, Eq. 13-14).

A row is compared with its own rejected answers and with those of the K rows of its group whose users are most similar.
The implicit rewards of shared answers are those already computed under *their* prompts, so sharing costs no forward
pass; their gradient flows **[choice]**.

Axes: B rows of one or more groups, K rows that a row reads (itself first), N own rejected answers of a row,
M = K * N answers that a row is compared with, D width of a user's state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: In ``source_BK``: no row.
NO_ROW = -1


def num_similar(group: int, rho: float) -> int:
    """``floor((b - 1) * rho)``: how many other rows of a group of b share with a row (NAPO, Eq. 13).

    >>> num_similar(16, 0.7), num_similar(11, 0.7), num_similar(1, 0.7)
    (10, 7, 0)
    """
    return math.floor(round((group - 1) * rho, 9))  # 0.7 * 10 may come out below 7


def similar_rows(state_BD: Tensor, similar: int) -> Tensor:
    """For each row of one group itself, then the ``similar`` others with the largest inner product of states. [B, K].

    Of equally similar rows the first ones are taken.

    >>> similar_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]]), 1).tolist()
    [[0, 2], [1, 2], [2, 0]]
    """
    scores_BB = state_BD @ state_BD.T
    scores_BB.fill_diagonal_(torch.inf)
    return scores_BB.argsort(dim=1, descending=True, stable=True)[:, : similar + 1]


def shared_values(values_BN: Tensor, source_BK: Tensor) -> Tensor:
    """The values of each row's own answers, then those of the rows that share with it. [B, M].

    ``source_BK`` indexes rows (``similar_rows``, offset to the group); values of NO_ROW are arbitrary and have to be
    masked (``shared_mask``).

    >>> shared_values(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0, 1], [1, NO_ROW]])).tolist()
    [[1, 2, 3, 4], [3, 4, 1, 2]]
    """
    return values_BN[source_BK.clamp(min=0)].flatten(1)


def shared_mask(mask_BN: Tensor, source_BK: Tensor, forbidden_BKN: Tensor) -> Tensor:
    """True where a row may be compared with the answer at that place of ``shared_values``. [B, M] bool.

    ``forbidden_BKN``: the answer is the row's own target, or an item of its history.
    """
    known_BK = source_BK != NO_ROW
    return (mask_BN[source_BK.clamp(min=0)] & known_BK.unsqueeze(2) & ~forbidden_BKN).flatten(1)
