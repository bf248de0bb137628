"""Items with equal codes are distinguished by their last code or by an added token; no item is dropped.

Both ways of choosing another last code look at all items with the same codes before it (a *family*) and at the
residuals of their latents for the last codebook, and never assign a code twice.

I items, N rows, G rows of one family, R of these without a code, F free codes, K codes of a level, L levels.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from tawin_nemo.semantic_ids.clustering import transport_plan
from tawin_nemo.semantic_ids.codebooks import Codebooks, squared_distances
from tawin_nemo.util.errors import DataError

#: Value of the dedup column for an item that needs no dedup token.
NO_TOKEN = -1
#: Sinkhorn: entropy as a share of the family's largest distance, scalings, and rounds until no two items are equal.
EPSILON, ITERATIONS, ROUNDS = 0.003, 50, 20


def groups_of(codes_IL: np.ndarray) -> list[np.ndarray]:
    """Items with equal rows, each group ascending, groups in the order of their rows."""
    order_I = np.lexsort((np.arange(len(codes_IL)), *codes_IL.T[::-1]))
    new = (np.diff(codes_IL[order_I], axis=0) != 0).any(axis=1)
    return np.split(order_I, np.flatnonzero(new) + 1)


def shared_rows(codes_IL: np.ndarray) -> np.ndarray:
    """bool [I]: another item has the same codes."""
    shared_I = np.zeros(len(codes_IL), dtype=bool)
    for group in groups_of(codes_IL):
        shared_I[group] = len(group) > 1
    return shared_I


def assign_unique(codes_IL: np.ndarray, books: Codebooks, latents_ID: np.ndarray) -> np.ndarray:
    """Codes [I, L] without collisions, with new last codes in families that have collisions.

    Within such a family the sum of the squared distances to the last codes is minimal under distinct codes
    (scipy's linear assignment). Of a family with more items than the last level has codes, those that this assignment
    leaves out go to the nearest family with room. Raises DataError naming an item for which there is none.
    """
    shared_I = shared_rows(codes_IL)
    crowded = [items_G for items_G in groups_of(codes_IL[:, :-1]) if shared_I[items_G].any()]
    if not crowded:
        return codes_IL
    reassigned = np.sort(np.concatenate(crowded))
    result_IL = codes_IL.copy()
    free_codes = FreeCodes(np.delete(codes_IL, reassigned, axis=0), books)
    result_IL[reassigned] = free_codes.assign(codes_IL[reassigned], latents_ID[reassigned], reassigned)
    return result_IL


class FreeCodes:
    """The unused last codes of every family of first codes; ``taken_IL`` are the codes in use."""

    def __init__(self, taken_IL: np.ndarray, books: Codebooks) -> None:
        self.books = books
        self.taken: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        for *first, last in taken_IL[:, : books.levels].tolist():
            self.taken[tuple(first)].add(last)

    def assign(self, wish_NL: np.ndarray, latents_ND: np.ndarray, names_N: np.ndarray) -> np.ndarray:
        """Free codes [N, L] for rows whose first codes are ``wish_NL``'s where there is room; ``names_N`` in errors."""
        codes_NL = wish_NL.copy()
        left_over: list[int] = []
        for rows_G in groups_of(wish_NL[:, :-1]):
            first = tuple(wish_NL[rows_G[0], :-1].tolist())
            free = self._free(first)
            cost_GF = self._cost(latents_ND[rows_G], wish_NL[rows_G])[:, free]
            assigned, columns = linear_sum_assignment(cost_GF)  # leaves rows out where columns are fewer
            codes_NL[rows_G[assigned], -1] = free[columns]
            self.taken[first].update(free[columns].tolist())
            left_over += np.delete(rows_G, assigned).tolist()
        for row in left_over:
            codes_NL[row] = self._nearest_family_with_room(latents_ND[row], codes_NL[row], int(names_N[row]))
        return codes_NL

    def _nearest_family_with_room(self, latent_D: np.ndarray, codes_L: np.ndarray, name: int) -> np.ndarray:
        """The nearest family with room, by the last code but one; then its nearest free last code."""
        level = self.books.levels - 2
        before = latent_D - self.books.decode(codes_L[None, :level])[0]
        distance_K = squared_distances(before[None], self.books.vectors_LKD[level])[0]
        for code in np.argsort(distance_K, kind="stable"):
            moved_L = codes_L.copy()
            moved_L[level] = code
            first = tuple(moved_L[:-1].tolist())
            free = self._free(first)
            if len(free):
                moved_L[-1] = free[self._cost(latent_D[None], moved_L[None])[0, free].argmin()]
                self.taken[first].add(int(moved_L[-1]))
                return moved_L
        raise DataError(
            f"item {name}: all {self.books.codes**2} IDs that begin with {codes_L[:level].tolist()} are taken; make "
            "the index again with more semantic_ids.codes or semantic_ids.levels, or use semantic_ids.collisions=dedup"
        )

    def _free(self, first: tuple[int, ...]) -> np.ndarray:
        return np.setdiff1d(np.arange(self.books.codes), sorted(self.taken[first]))

    def _cost(self, latents_GD: np.ndarray, codes_GL: np.ndarray) -> np.ndarray:
        return squared_distances(self.books.residual(latents_GD, codes_GL), self.books.vectors_LKD[-1])


def assign_unique_sinkhorn(codes_IL: np.ndarray, books: Codebooks, latents_ID: np.ndarray) -> np.ndarray:
    """Codes [I, L] without collisions by Sinkhorn's algorithm, as in LC-Rec (Zheng et al. 2024, Section 3.1).

    An approximation of ``assign_unique``, which is optimal.

    Each round gives every item the code with the most mass in a plan that uses the free codes evenly; the first item of
    those that agree keeps it, the others continue with the free codes. Raises DataError naming items that are
    equal after ROUNDS rounds (a round separates one of several equal vectors), or the items of a family that is larger
    than the codebook.
    """
    shared_I, result_IL = shared_rows(codes_IL), codes_IL.copy()
    for items_G in groups_of(codes_IL[:, :-1]):
        if not shared_I[items_G].any():
            continue
        if len(items_G) > books.codes:
            raise DataError(
                f"{len(items_G)} items begin with the codes {codes_IL[items_G[0], :-1].tolist()} and the last level "
                f"has {books.codes}: items {format_items(items_G)}; set semantic_ids.collisions=assign or dedup"
            )
        residual_GD = books.residual(latents_ID[items_G], codes_IL[items_G])
        code_G = _sinkhorn_codes(squared_distances(residual_GD, books.vectors_LKD[-1]))
        if (code_G < 0).any():
            raise DataError(
                f"items {format_items(items_G[code_G < 0])} keep equal codes {codes_IL[items_G[0]].tolist()} under "
                "semantic_ids.collisions=sinkhorn (equal texts?); use assign or dedup"
            )
        result_IL[items_G, -1] = code_G
    return result_IL


def _sinkhorn_codes(cost_GK: np.ndarray) -> np.ndarray:
    """Distinct codes [G]; -1 for rows that have none after ROUNDS rounds."""
    code_G = np.full(len(cost_GK), -1)
    free_K = np.ones(cost_GK.shape[1], dtype=bool)
    cost = torch.from_numpy(cost_GK / max(cost_GK.max(), np.finfo(np.float64).tiny))
    for _ in range(ROUNDS):
        open_R, columns = np.flatnonzero(code_G < 0), np.flatnonzero(free_K)
        if not len(open_R):
            break
        mass = torch.full((len(columns),), len(open_R) / len(columns), dtype=cost.dtype)
        plan = transport_plan(cost[open_R][:, columns], mass, epsilon=EPSILON, iterations=ITERATIONS)
        wish_R = columns[plan.argmax(dim=1).numpy()]
        chosen, first = np.unique(wish_R, return_index=True)
        code_G[open_R[first]] = chosen
        free_K[chosen] = False
    return code_G


def with_dedup_token(codes_IL: np.ndarray) -> np.ndarray:
    """One more column [I, L + 1]: items that share their codes are counted from 0, the others have NO_TOKEN."""
    token_I = np.full(len(codes_IL), NO_TOKEN, dtype=codes_IL.dtype)
    for items_G in groups_of(codes_IL):
        if len(items_G) > 1:
            token_I[items_G] = np.arange(len(items_G))
    return np.column_stack([codes_IL, token_I])


def format_items(items: np.ndarray, shown: int = 5) -> str:
    """The first ``shown`` item numbers as text for a message, with an ellipsis if there are more."""
    return ", ".join(map(str, items[:shown].tolist())) + (" ..." if len(items) > shown else "")
