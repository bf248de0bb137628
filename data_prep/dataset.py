"""The prepared folder: Parquet files, readable statistics, and a manifest with checksums; leak checks of its splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from tawin_nemo.data.interactions import FORMAT, ITEMS_FILE, MANIFEST, NO_TITLES, USERS_FILE, Split
from tawin_nemo.data_prep.parquet_rows import write_table
from tawin_nemo.data_prep.splits import LEAVE_ONE_OUT, late_train_rows
from tawin_nemo.types import CANDIDATES, HISTORY, SPLITS, TARGET, TIME, USER, TokenRows
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import atomic_directory, sha256, write_json

STATISTICS = "statistics.md"
#: Sources whose samples come as they are.
READY_MADE = ("inter", "candidates", "split_csv")


@dataclass(frozen=True)
class LeakReport:
    """Time borders of the splits, and how many samples do not continue the previous sample of the same user."""

    borders: dict[str, tuple[int, int]]
    rows: int
    broken_windows: int


def leak_check(
    splits: Mapping[str, Split], num_items: int, max_history: int, *, by_time: bool = True
) -> LeakReport:  # fmt: skip
    """Check order in time, item indices and windows of train, valid and test.

    ``by_time``: the splits follow each other in time (leave-one-out follows users instead). Raises DataError if times
    are not ascending within the splits, and across them with ``by_time``, an item index is outside
    0..num_items-1, or a history is empty or longer than ``max_history``. Broken windows are only counted: sample
    n + 1 of a user must have the history (history of sample n + its target), cut to the newest ``max_history``, and a
    user's first sample a history of one item; anything else means that a history has gaps or holds later items.
    """
    borders = {}
    latest, latest_split = None, ""
    for name in SPLITS:
        samples = splits[name]
        if len(samples) == 0:
            raise DataError(f"split {name} has no rows; leak check needs all of {', '.join(SPLITS)}")
        check_indices(name, samples, num_items, max_history)
        time = samples.time_N
        if (backwards := np.flatnonzero(np.diff(time) < 0)).size:
            raise DataError(f"leak: {name} row {int(backwards[0]) + 1} is earlier than the row before it")
        if by_time and latest is not None and time[0] < latest:
            raise DataError(f"leak: {latest_split} ends at time {latest}, later than {name} begins ({time[0]})")
        latest, latest_split = int(time[-1]), name
        borders[name] = (int(time[0]), int(time[-1]))
    ordered = [splits[name] for name in SPLITS]
    return LeakReport(borders, sum(map(len, ordered)), _broken_windows(ordered, max_history))


def check_indices(name: str, samples: Split, num_items: int, max_history: int) -> None:
    """Raise DataError for an item outside 0..num_items-1 and for a history that is empty or too long."""
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


@dataclass(frozen=True)
class Step:
    """Counts after one filter; users and items are None where they are not known yet."""

    name: str
    interactions: int
    users: int | None
    items: int | None


@dataclass(frozen=True)
class Prepared:
    """A data set that is ready to be written. ``items`` has the columns of items.parquet, ordered by item index.

    ``users`` has the columns of users.parquet, None where users have no names; ``ties`` is ``ties.tie_statistics``;
    without ``has_titles`` the titles are external ids.
    """

    name: str
    source: str
    items: pl.DataFrame
    splits: dict[str, Split]
    max_history: int
    steps: list[Step]
    problems: dict[str, Any] = field(default_factory=dict)
    extra_files: dict[str, bytes] = field(default_factory=dict)
    users: pl.DataFrame | None = None
    ties: dict[str, Any] | None = None
    split: str = "ratio"
    has_titles: bool = True


@dataclass(frozen=True)
class Summary:
    """What the manifest and statistics.md of a prepared folder say beside the checksums of its files."""

    name: str
    source: str
    steps: list[Step]
    problems: dict[str, Any]
    statistics: dict[str, Any]
    leaks: LeakReport
    has_titles: bool = True


def write_dataset(prepared: Prepared, out: Path, request: dict[str, Any]) -> Path:
    """Write the folder ``out`` atomically; the same input gives the same bytes.

    ``request`` (parameters and source files with size and SHA-256) goes into the manifest and decides later whether the
    folder can be reused. Raises DataError if the leak check fails.
    """
    by_time = prepared.split != LEAVE_ONE_OUT
    report = leak_check(prepared.splits, prepared.items.height, prepared.max_history, by_time=by_time)
    if prepared.source not in READY_MADE:
        check_windows(report)
    with atomic_directory(out) as folder:
        write_table(prepared.items.to_arrow(), folder / ITEMS_FILE)
        if prepared.users is not None:
            write_table(prepared.users.to_arrow(), folder / USERS_FILE)
        for name in SPLITS:
            write_table(sample_table(prepared.splits[name]), folder / f"{name}.parquet")
        for name, content in prepared.extra_files.items():
            (folder / name).write_bytes(content)
        parts = prepared.name, prepared.source, prepared.steps, prepared.problems, _statistics(prepared)
        write_summary(Summary(*parts, report, prepared.has_titles), folder, request)
    return out


def check_windows(report: LeakReport) -> None:
    """Raise DataError when samples that were made here do not continue each other."""
    if report.broken_windows:
        raise DataError(f"leak: {report.broken_windows} samples do not continue the same user's previous sample")


def write_summary(summary: Summary, folder: Path, request: dict[str, Any]) -> None:
    """Write statistics.md and the manifest with the checksums of all files into ``folder``, which has all others."""
    (folder / STATISTICS).write_text(_markdown(summary), encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "name": summary.name,
        "source": summary.source,
        "request": request,
        "statistics": summary.statistics,
        "steps": [asdict(step) for step in summary.steps],
        "problems": summary.problems,
        "leak_check": asdict(summary.leaks),
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    } | ({} if summary.has_titles else {NO_TITLES: True})
    write_json(folder / MANIFEST, manifest)


def sample_table(samples: Split) -> pa.Table:
    """The columns of a split's file."""
    table = pa.table(
        {
            USER: pa.array(samples.user_N.astype(np.int64)),
            HISTORY: _lists(samples.history),
            TARGET: pa.array(samples.target_N.astype(np.int64)),
            TIME: pa.array(samples.time_N.astype(np.int64)),
        }
    )
    return table if samples.candidates is None else table.append_column(CANDIDATES, _lists(samples.candidates))


def _lists(rows: TokenRows) -> pa.ListArray:
    offsets = pa.array(rows.offsets.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(rows.flat.astype(np.int64)))


def _statistics(prepared: Prepared) -> dict[str, Any]:
    splits = prepared.splits
    in_train = np.zeros(prepared.items.height, dtype=bool)
    for values in (splits["train"].target_N, splits["train"].history.flat):
        in_train[values] = True
    targets = {name: np.unique(splits[name].target_N) for name in SPLITS}
    rows = {name: len(splits[name]) for name in SPLITS}
    users = len(np.unique(np.concatenate([splits[name].user_N for name in SPLITS])))
    lengths = np.concatenate([splits[name].history.lengths for name in SPLITS])
    ties = {} if prepared.ties is None else {"ties": prepared.ties}
    late = {"late_train_rows": late_train_rows(splits)} if prepared.split == LEAVE_ONE_OUT else {}
    return (
        ties
        | late
        | {
            "items": prepared.items.height,
            "users": users,
            "rows": rows,
            "mean_history": round(float(lengths.mean()), 4),
            "distinct_titles": prepared.items["title"].n_unique(),
            "unseen_targets": {name: int((~in_train[targets[name]]).sum()) for name in SPLITS[1:]},
        }
    )


def _markdown(summary: Summary) -> str:
    statistics = summary.statistics
    rows = statistics["rows"]
    unseen = statistics["unseen_targets"]
    splits = " / ".join(f"{rows[name]:,}" for name in SPLITS)
    lines = [
        f"# {summary.name}",
        "",
        "| | |",
        "|---|---|",
        f"| items | {statistics['items']:,} |",
        f"| users | {statistics['users']:,} |",
        f"| train / valid / test | {splits} |",
        f"| mean history length | {statistics['mean_history']:.2f} |",
        f"| distinct titles | {statistics['distinct_titles']:,} |",
        f"| distinct targets never in train, valid / test | {unseen['valid']:,} / {unseen['test']:,} |",
        f"| samples that do not continue the user's previous sample | {summary.leaks.broken_windows:,} |",
        *_ordering(statistics),
        "",
        "| step | interactions | users | items |",
        "|---|---|---|---|",
    ]
    lines += [f"| {s.name} | {_count(s.interactions)} | {_count(s.users)} | {_count(s.items)} |" for s in summary.steps]
    return "\n".join(lines) + "\n"


def _ordering(statistics: dict[str, Any]) -> list[str]:
    """Rows of the statistics about ties, and about train rows later than test."""
    lines = []
    if ties := statistics.get("ties"):
        share, larger = ties["tied"] / max(1, ties["neighbours"]), ties["larger_id_share"]
        lines.append(f"| neighbours of one user with the same time | {ties['tied']:,} ({share:.1%}) |")
        if larger is not None:
            lines.append(f"| of these with the larger item id second (chance: 50 %) | {larger:.1%} |")
    if "late_train_rows" in statistics:
        lines.append(f"| train rows not earlier than the first of test | {statistics['late_train_rows']:,} |")
    return lines


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
