"""Train, valid and test of a prepared log: 8:1:1 by time, the last targets of each user, or by dates."""

from __future__ import annotations

import numpy as np

from tawin_nemo.config.schema import PrepareConfig
from tawin_nemo.data.interactions import Split
from tawin_nemo.types import SPLITS
from tawin_nemo.util import times
from tawin_nemo.util.errors import DataError

LEAVE_ONE_OUT = "leave_one_out"


def split_samples(samples: Split, prepare: PrepareConfig) -> dict[str, Split]:
    """The splits by name, as ``prepare.split`` says. Raises DataError with the sizes when one of them is empty."""
    if prepare.split == LEAVE_ONE_OUT:
        parts = leave_one_out(samples)
    elif prepare.split == "date":
        parts = split_by_dates(samples, prepare.valid_start, prepare.test_start)
    else:
        parts = split_by_time(samples)
    splits = dict(zip(SPLITS, parts, strict=True))
    check_sizes({name: len(part) for name, part in splits.items()}, prepare)
    return splits


def check_sizes(rows: dict[str, int], prepare: PrepareConfig) -> None:
    """Raise DataError when a split has no row."""
    if all(rows.values()):
        return
    sizes = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    remedy = {
        "date": f"move prepare.valid_start={prepare.valid_start} and prepare.test_start={prepare.test_start}",
        LEAVE_ONE_OUT: "it needs users with at least four interactions",
    }.get(prepare.split, "it needs 10 samples")
    raise DataError(f"prepare.split={prepare.split} leaves a split empty ({sizes}): {remedy}")


def ratio_borders(count: int) -> tuple[int, int]:
    """Rows of train, and of train and valid together, for 8:1:1 of ``count`` rows."""
    return count * 8 // 10, count * 9 // 10


def date_borders(valid_start: str, test_start: str) -> tuple[int, int]:
    """First second (UTC) of valid and of test for days of the keys."""
    valid, test = (times.first_second(day) or 0 for day in (valid_start, test_start))
    return valid, test


def split_by_time(samples: Split) -> tuple[Split, Split, Split]:
    """Train, valid and test: the first 80 %, the next 10 % and the last 10 % of the rows (borders rounded down)."""
    count = len(samples)
    train, valid = ratio_borders(count)
    return samples.slice(0, train), samples.slice(train, valid), samples.slice(valid, count)


def leave_one_out(samples: Split) -> tuple[Split, Split, Split]:
    """Each user's last sample is test, the one before valid, the others train; each in time order.

    A user with one sample (two interactions) is train only. Train then holds targets that are later than other users'
    test targets.
    """
    order = np.argsort(samples.user_N, kind="stable")
    user_N = samples.user_N[order]
    row_N = np.arange(len(order))
    is_last_N = np.append(user_N[1:] != user_N[:-1], True)[: len(order)]
    end_N = np.minimum.accumulate(np.where(is_last_N, row_N, len(order))[::-1])[::-1]
    from_end_N = np.empty(len(order), dtype=np.int64)
    from_end_N[order] = end_N - row_N
    alone_N = np.bincount(samples.user_N)[samples.user_N] == 1
    train_N = (from_end_N >= 2) | alone_N
    masks = (train_N, (from_end_N == 1) & ~alone_N, (from_end_N == 0) & ~alone_N)
    train, valid, test = (_take(samples, np.flatnonzero(mask)) for mask in masks)
    return train, valid, test


def split_by_dates(samples: Split, valid_start: str, test_start: str) -> tuple[Split, Split, Split]:
    """Train before the day ``valid_start``, valid before the day ``test_start``, test from then on (UTC)."""
    borders = date_borders(valid_start, test_start)
    first, second = (int(border) for border in np.searchsorted(samples.time_N, borders))
    return samples.slice(0, first), samples.slice(first, second), samples.slice(second, len(samples))


def late_train_rows(splits: dict[str, Split]) -> int:
    """Rows of train whose target is not earlier than the first target of test: 0 for splits by time."""
    return int((splits["train"].time_N >= splits["test"].time_N.min()).sum())


def _take(samples: Split, rows: np.ndarray) -> Split:
    return Split(samples.user_N[rows], samples.history.take(rows), samples.target_N[rows], samples.time_N[rows])
