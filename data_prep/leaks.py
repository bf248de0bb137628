"""Checks that no sample knows the future."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tawin_nemo.data.interactions import Split
from tawin_nemo.types import SPLITS, TokenRows
from tawin_nemo.util.errors import DataError


@dataclass(frozen=True)
class LeakReport:
    """Time borders of the splits, and how many samples do not continue the previous sample of the same user."""

    borders: dict[str, tuple[int, int]]
    rows: int
    broken_windows: int


def leak_check(splits: Mapping[str, Split], num_items: int, max_history: int) -> LeakReport:
    """Check order in time, item indices and windows of train, valid and test.

    Raises DataError if times are not ascending within and across the splits, an item index is outside
    0..num_items-1, or a history is empty or longer than ``max_history``. Windows are counted, not refused: sample
    n + 1 of a user must have the history (history of sample n + its target), cut to the newest ``max_history``, and a
    user's first sample a history of one item; anything else means that a history has gaps or holds later items.
    """
    borders = {}
    latest, latest_split = None, ""
    for name in SPLITS:
        samples = splits[name]
        if len(samples) == 0:
            raise DataError(f"split {name} has no rows; leak check needs all of {', '.join(SPLITS)}")
        _check_indices(name, samples, num_items, max_history)
        time = samples.time_N
        if (backwards := np.flatnonzero(np.diff(time) < 0)).size:
            raise DataError(f"leak: {name} row {int(backwards[0]) + 1} is earlier than the row before it")
        if latest is not None and time[0] < latest:
            raise DataError(f"leak: {latest_split} ends at time {latest}, later than {name} begins ({time[0]})")
        latest, latest_split = int(time[-1]), name
        borders[name] = (int(time[0]), int(time[-1]))
    ordered = [splits[name] for name in SPLITS]
    return LeakReport(borders, sum(map(len, ordered)), _broken_windows(ordered, max_history))


def _check_indices(name: str, samples: Split, num_items: int, max_history: int) -> None:
    for what, values in (("target", samples.target_N), ("history", samples.history.flat)):
        wrong = values[(values < 0) | (values >= num_items)]
        if len(wrong):
            raise DataError(f"{name}: {what} names item {wrong[0]}, the catalog has 0..{num_items - 1}")
    lengths = samples.history.lengths
    wrong = np.flatnonzero((lengths < 1) | (lengths > max_history))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"{name} row {row}: history of {lengths[row]} items, expected 1..{max_history}")


def _broken_windows(ordered: list[Split], max_history: int) -> int:
    user_N = np.concatenate([samples.user_N for samples in ordered])
    target_N = np.concatenate([samples.target_N for samples in ordered])
    history_NH = np.concatenate([_right_aligned(samples.history, max_history) for samples in ordered])
    order = np.argsort(user_N, kind="stable")
    user_N, target_N, history_NH = user_N[order], target_N[order], history_NH[order]
    continued_NH = np.concatenate([history_NH[:, 1:], target_N[:, None]], axis=1)
    same_user = user_N[1:] == user_N[:-1]
    wrong = same_user & (history_NH[1:] != continued_NH[:-1]).any(axis=1)
    is_first = np.concatenate([[True], ~same_user])
    wrong_first = is_first & (history_NH[:, :-1] != -1).any(axis=1)
    return int(wrong.sum() + wrong_first.sum())


def _right_aligned(history: TokenRows, width: int) -> np.ndarray:
    history_NH = np.full((len(history), width), -1, dtype=np.int32)
    mask = np.arange(width) >= width - history.lengths[:, None]
    history_NH[mask] = history.flat
    return history_NH
