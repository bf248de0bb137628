"""The filters of the paper, in its order: time window, valid titles, k-core, windows, split (Appendix G.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.config.schema import PrepareConfig
from tawin_nemo.data.interactions import Split
from tawin_nemo.data_prep.dataset import Prepared
from tawin_nemo.data_prep.item_texts import untitled, valid_items
from tawin_nemo.data_prep.log_steps import LogSteps
from tawin_nemo.data_prep.raw import GatheredReviews, RawData
from tawin_nemo.data_prep.splits import split_samples
from tawin_nemo.data_prep.ties import order_ties, report_ties, tie_statistics
from tawin_nemo.types import EXTERNAL_ID, ITEM, TIME, USER, TokenRows


def build(raw: RawData, prepare: PrepareConfig, *, max_history: int, seed: int = 0) -> Prepared:
    """Run the filters and make samples. Exact duplicates (user, item, time) go before the k-core.

    ``raw`` has its reviews in memory. Item indices follow the sorted external ids, user indices likewise. Where there
    is no item table, titles are the external ids. Raises DataError, with the counts of every step, when a filter leaves
    nothing.
    """
    assert isinstance(raw.reviews, GatheredReviews)
    steps, reviews = LogSteps(raw, prepare), raw.reviews.inside
    steps.add_window(*_counts(reviews))
    reviews = reviews.unique(subset=[USER, ITEM, TIME], keep="first", maintain_order=True)
    steps.add_unique(*_counts(reviews))

    reviewed = reviews.group_by(ITEM).len("reviews")
    items, faults = usable_items(raw, reviewed, prepare)
    reviews = reviews.join(items.select(ITEM), on=ITEM, how="semi", maintain_order="left")
    steps.add_titled(faults, *_counts(reviews))

    user_N, item_N = _codes(reviews[USER]), _codes(reviews[ITEM])
    reviews = reviews.filter(pl.Series(k_core(user_N, item_N, prepare.k_core)))
    steps.add_core(*_counts(reviews))

    order = order_ties(_codes(reviews[ITEM]), prepare.ties, seed)
    log = _codes(reviews[USER])[order], _codes(reviews[ITEM])[order], reviews[TIME].to_numpy()[order]
    ties = tie_statistics(*log)
    report_ties(ties, prepare.ties)
    samples = sliding_windows(*log, max_history)
    users, kept = reviews[USER].unique().sort(), reviews[ITEM].unique().sort()
    steps.add_samples(max_history, len(samples), len(users), len(kept))
    return Prepared(
        raw.name, raw.source, item_table(kept, items), split_samples(samples, prepare), max_history, steps.steps,
        problems=raw.report() | {"refused_items": faults}, users=user_table(users), ties=ties, split=prepare.split,
        has_titles=raw.items is not None,
    )  # fmt: skip


def usable_items(
    raw: RawData, reviewed: pl.DataFrame, prepare: PrepareConfig
) -> tuple[pl.DataFrame, dict[str, Any]]:  # fmt: skip
    """Texts (ITEM and ITEM_TEXTS) of the items that count, and what is wrong with the others.

    ``reviewed``: the items of the log (ITEM) with the number of their ``reviews``.
    """
    return untitled(reviewed[ITEM]) if raw.items is None else valid_items(raw.items, reviewed, prepare)


def item_table(external_ids: pl.Series, texts: pl.DataFrame) -> pl.DataFrame:
    """items.parquet: item n has the n-th of ``external_ids``; ``texts`` has them in column ITEM, with their texts."""
    found = external_ids.alias(ITEM).to_frame().join(texts, on=ITEM, how="left", maintain_order="left")
    return found.rename({ITEM: EXTERNAL_ID}).with_row_index(ITEM).with_columns(pl.col(ITEM).cast(pl.Int64))


def user_table(external_ids: pl.Series) -> pl.DataFrame:
    """users.parquet: number and external id of each user; user n has the n-th of ``external_ids``."""
    return pl.DataFrame({USER: pl.int_range(len(external_ids), dtype=pl.Int64, eager=True), EXTERNAL_ID: external_ids})


def _codes(column: pl.Series) -> np.ndarray:
    """Dense codes in the order of the sorted values."""
    return column.rank("dense").cast(pl.Int64).to_numpy() - 1


def _counts(reviews: pl.DataFrame) -> tuple[int, int, int]:
    """Interactions, users, items."""
    return reviews.height, reviews[USER].n_unique(), reviews[ITEM].n_unique()


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


def sliding_windows(user_N: np.ndarray, item_N: np.ndarray, time_N: np.ndarray, max_history: int) -> Split:
    """Every interaction of a user but the first becomes a target; its history is the up to ``max_history`` before it.

    Ties in time are broken by the order of the input (``ties.order_ties``) within a user, and by user, then by
    position, between samples. A sample's time is its target's; the samples are in global time order.
    """
    order = np.lexsort((time_N, user_N))  # lexsort is stable: equal times keep their input order
    user, item, time = user_N[order], item_N[order], time_N[order]
    row = np.arange(len(user))
    is_first = np.ones(len(user), dtype=bool)
    is_first[1:] = user[1:] != user[:-1]
    first_row = np.maximum.accumulate(np.where(is_first, row, 0))
    position = row - first_row

    samples = np.flatnonzero(~is_first)
    samples = samples[np.argsort(time[samples], kind="stable")]  # they were in the order of user and position
    length = np.minimum(position[samples], max_history)
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    start_of_flat = np.repeat(samples - length - offsets[:-1], length)
    history = TokenRows(item[start_of_flat + np.arange(offsets[-1])], offsets)
    return Split(user[samples], history, item[samples], time[samples])
