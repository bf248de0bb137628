"""Rejected items that need no model: any item, or some of a row's candidate set. Pure functions of seed and step.

An item is never rejected where it is the row's target, lies in the history that the prompt shows, or is written like
one of these (shares its token path). The rejected items of a row have different paths.

Axes: R rows, N rejected items of a row, C items of a candidate set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tawin_nemo.data.samples import Samples
from tawin_nemo.types import NO_ITEM
from tawin_nemo.util.errors import DataError

#: Parts of the seeds, so that the draws of a step, of a set and of other users of the seed differ.
_RANDOM, _SET, _OF_SET = 11, 12, 13
#: Rounds of draws before all items are listed: only tiny catalogs need more.
_TRIES = 8


@dataclass(frozen=True, eq=False)
class RandomNegatives:
    """``num`` items of the catalog for each row, uniformly, new ones at each step.

    ``leaf_I``: the leaf of each item in the catalog's trie (``Catalog.leaf_I``).
    """

    samples: Samples
    leaf_I: np.ndarray
    num: int
    seed: int

    def items(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Rejected items of ``rows`` at ``step``; NO_ITEM where the catalog has too few. [R, N] int64."""
        found_RN = np.full((len(rows), self.num), NO_ITEM, dtype=np.int64)
        for place, row in enumerate(rows):
            drawn = draw_items(
                self.leaf_I, forbidden_items(self.samples, row), self.num, [self.seed, _RANDOM, step, row]
            )
            found_RN[place, : len(drawn)] = drawn
        return found_RN


@dataclass(frozen=True, eq=False)
class CandidateNegatives:
    """``num`` items out of the candidate set of each row, new ones at each step; the set never changes.

    Candidate sets are those of ``candidate_set`` with ``candidates`` items, or those of the data.
    """

    samples: Samples
    leaf_I: np.ndarray
    num: int
    seed: int
    candidates: int

    def items(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Rejected items of ``rows`` at ``step``. [R, N] int64.

        Raises DataError when a row's candidate set has fewer than ``num`` items besides the target.
        """
        found_RN = np.empty((len(rows), self.num), dtype=np.int64)
        for place, row in enumerate(rows):
            items_C = candidate_set(self.samples, self.leaf_I, int(row), self.candidates, self.seed)
            others = items_C[items_C != self.samples.target_N[row]]
            if len(others) < self.num:
                raise DataError(
                    f"row {row} of train has {len(others)} candidates besides its target, but "
                    f"preference.num_negatives={self.num}; lower it"
                )
            draw = np.random.default_rng([self.seed, _OF_SET, step, row])
            found_RN[place] = draw.choice(others, size=self.num, replace=False)
        return found_RN


def candidate_set(samples: Samples, leaf_I: np.ndarray, row: int, size: int, seed: int) -> np.ndarray:
    """The candidates of a row that come with the data, else its target and ``size - 1`` random items, shuffled. [C].

    The candidate protocol of S-DPO and NAPO (20 items); a pure function of seed and row. Fewer items where the catalog
    has too few.
    """
    if samples.candidates is not None:
        return samples.candidates[row]
    drawn = draw_items(leaf_I, forbidden_items(samples, row), size - 1, [seed, _SET, row])
    items_C = np.append(drawn, samples.target_N[row])
    return np.random.default_rng([seed, _SET, row, 1]).permutation(items_C)


def forbidden_items(samples: Samples, row: int) -> np.ndarray:
    """The target of a row and the items of its history."""
    return np.append(samples.history[int(row)], samples.target_N[row])


def draw_items(leaf_I: np.ndarray, forbidden: np.ndarray, num: int, seed: list[int]) -> np.ndarray:
    """At most ``num`` items on different paths, none on a path of ``forbidden``; uniformly, in the order drawn."""
    draw = np.random.default_rng(seed)
    taken = set(leaf_I[forbidden].tolist())
    found: list[int] = []
    for _ in range(_TRIES):
        _keep_new(draw.integers(len(leaf_I), size=2 * num + 8), leaf_I, taken, found, num)
        if len(found) == num:
            return np.array(found, dtype=np.int64)
    _keep_new(draw.permutation(len(leaf_I)), leaf_I, taken, found, num)
    return np.array(found, dtype=np.int64)


def _keep_new(drawn: np.ndarray, leaf_I: np.ndarray, taken: set[int], found: list[int], num: int) -> None:
    """Append items whose path is not taken yet to ``found``, up to ``num``."""
    for item, leaf in zip(drawn.tolist(), leaf_I[drawn].tolist(), strict=True):
        if len(found) == num:
            return
        if leaf not in taken:
            taken.add(leaf)
            found.append(item)
