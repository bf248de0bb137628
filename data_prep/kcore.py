"""Iterative k-core of the bipartite user-item graph."""

from __future__ import annotations

import numpy as np


def k_core(user_N: np.ndarray, item_N: np.ndarray, k: int) -> np.ndarray:
    """Mask of the interactions that remain when users and items with fewer than k of them go, until nothing changes.

    ``user_N`` and ``item_N`` are non-negative integer codes. Interactions are counted with their multiplicity. The
    result is the unique largest set in which every user and every item has at least k interactions, so the order of
    removal does not matter. Each round is linear in the interactions that are left.
    """
    alive = np.arange(len(user_N))
    while len(alive):
        user, item = user_N[alive], item_N[alive]
        keep = (np.bincount(user)[user] >= k) & (np.bincount(item)[item] >= k)
        if keep.all():
            break
        alive = alive[keep]
    mask_N = np.zeros(len(user_N), dtype=bool)
    mask_N[alive] = True
    return mask_N
