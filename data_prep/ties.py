"""Interactions of one user at the same time: their order says nothing, but a model can learn it.

Amazon's times are days, and its files list the reviews of a day by asin: in file order the later one of two has the
larger asin far more often than half of the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tawin_nemo.util.log import say

#: Share of larger ids among tied neighbours beyond which the order is called one of ids.
BIASED = (0.45, 0.55)
#: Tied neighbours below which a share says nothing.
ENOUGH = 100


def order_ties(item_N: np.ndarray, ties: str, seed: int) -> np.ndarray:
    """A permutation [N] that puts rows in the order wanted among equal times, for a stable sort by user and time.

    ``ties``: ``file`` keeps the order, ``random`` shuffles by ``seed``, ``item`` goes by the item code.
    """
    if ties == "random":
        return shuffled(np.empty(len(item_N), dtype=np.int64), seed)
    return np.argsort(item_N, kind="stable") if ties == "item" else np.arange(len(item_N))


def shuffled(order_N: np.ndarray, seed: int) -> np.ndarray:
    """Fill ``order_N`` (also a memory-mapped file) with the permutation of prepare.ties=random and return it."""
    flat_N = np.asarray(order_N)
    flat_N[:] = np.arange(len(flat_N))
    np.random.default_rng([seed, 6]).shuffle(flat_N)
    return order_N


def tie_statistics(user_N: np.ndarray, item_N: np.ndarray, time_N: np.ndarray) -> dict[str, Any]:
    """Neighbours (an interaction and the same user's next), those of equal time, share with the larger id second.

    Rows are in the order that ``sliding_windows`` breaks ties by. ``larger_id_share`` is taken over tied neighbours of
    different items, None without any; an order that knows nothing of ids gives 0.5.
    """
    order = np.lexsort((time_N, user_N))
    user_N, item_N, time_N = user_N[order], item_N[order], time_N[order]
    neighbours = user_N[1:] == user_N[:-1]
    tied = neighbours & (time_N[1:] == time_N[:-1])
    different = tied & (item_N[1:] != item_N[:-1])
    larger = different & (item_N[1:] > item_N[:-1])
    return tie_counts(*(int(mask.sum()) for mask in (neighbours, tied, different, larger)))


def tie_counts(neighbours: int, tied: int, different: int, larger: int) -> dict[str, Any]:
    """The statistics from counts: neighbours, those of equal time, of these those of different items, and with the
    larger id second."""
    share = round(larger / different, 4) if different else None
    return {"neighbours": neighbours, "tied": tied, "larger_id_share": share}


def report_ties(statistics: dict[str, Any], ties: str) -> None:
    """Say how many neighbours are tied, and which key helps where the file's order is one of ids."""
    tied, share = statistics["tied"], statistics["larger_id_share"]
    if not tied:
        return
    line = (
        f"{tied:,} of {statistics['neighbours']:,} neighbours in users' logs have the same time (prepare.ties={ties})"
    )
    if share is not None:
        line += f"; {share:.0%} of them go to the larger item id, where chance gives 50 %"
    if share is not None and ties == "file" and tied >= ENOUGH and not BIASED[0] <= share <= BIASED[1]:
        line += ": a model can learn that order; prepare.ties=random removes it"
    say(line)
