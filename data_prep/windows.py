"""Interactions to samples: per user a sliding window, over all users one global time order, and the split by time."""

from __future__ import annotations

import numpy as np

from tawin_nemo.data.interactions import Split
from tawin_nemo.types import TokenRows


def sliding_windows(user_N: np.ndarray, item_N: np.ndarray, time_N: np.ndarray, max_history: int) -> Split:
    """Every interaction of a user but the first becomes a target; its history is the up to ``max_history`` before it.

    Ties in time are broken by the order of the input (the review file's) within a user, and by user, then by position,
    between samples. A sample's time is its target's; the samples are in global time order.
    """
    order = np.lexsort((time_N, user_N))  # lexsort is stable: equal times keep their input order
    user, item, time = user_N[order], item_N[order], time_N[order]
    place = np.arange(len(user))
    is_first = np.ones(len(user), dtype=bool)
    is_first[1:] = user[1:] != user[:-1]
    first_place = np.maximum.accumulate(np.where(is_first, place, 0))
    position = place - first_place

    samples = np.flatnonzero(~is_first)
    samples = samples[np.argsort(time[samples], kind="stable")]  # they were in the order of user and position
    length = np.minimum(position[samples], max_history)
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    start_of_flat = np.repeat(samples - length - offsets[:-1], length)
    history = TokenRows(item[start_of_flat + np.arange(offsets[-1])], offsets)
    return Split(user[samples], history, item[samples], time[samples])


def split_by_time(samples: Split) -> tuple[Split, Split, Split]:
    """Train, valid and test: the first 80 %, the next 10 % and the last 10 % of the rows (borders rounded down)."""
    count = len(samples)
    train, valid = count * 8 // 10, count * 9 // 10
    return samples.slice(0, train), samples.slice(train, valid), samples.slice(valid, count)
