"""How new the data of a nightly run are, and how far they have moved from those of the published version.

``data`` in ``gate.json``:

- ``newest_interaction``: UTC time of the newest interaction of any split; ``age_days``: days from it to the end of
  ``date``. Both null for data that have an order instead of times.
- ``items``, ``new_items``: size of the catalog, and the share of it that the published version's catalog does not have;
  ``gone_items``: the share of the published catalog that this one does not have.
- ``users``, ``new_users``: users of the data, and the share of them that the published version's data do not have; null
  where users have no names, or those data are gone.
- ``popularity_drift``: Jensen-Shannon divergence, in bits (0 = equal, 1 = no item in common), between the distributions
  of training interactions over items, published version's and this one's. ``valid_drift``: the same between this
  data set's training and its valid interactions, which are newer.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from tawin_nemo.data.interactions import USERS_FILE, Dataset
from tawin_nemo.types import EXTERNAL_ID, SPLITS
from tawin_nemo.util.files import atomic_path

INTERACTIONS = "interactions"
#: Times outside of 1990 .. 2100, in UTC seconds, are a row order.
_FIRST_TIME, _LAST_TIME = 631_152_000, 4_102_444_800


@dataclass(frozen=True)
class DataFigures:
    """See the module's docstring. Shares are of 1."""

    newest_interaction: str | None
    age_days: float | None
    items: int
    new_items: float | None
    gone_items: float | None
    users: int | None
    new_users: float | None
    popularity_drift: float | None
    valid_drift: float


def popularity(dataset: Dataset, split: str = "train") -> pl.DataFrame:
    """External id and number of interactions in a split, of every item of the catalog, in its order."""
    count_I = np.bincount(getattr(dataset, split).target_N, minlength=len(dataset.items))
    return pl.DataFrame({EXTERNAL_ID: dataset.items.external_ids, INTERACTIONS: count_I})


def write_popularity(path: Path, dataset: Dataset) -> None:
    """Write ``popularity`` of train as Parquet."""
    with atomic_path(path) as temporary:
        popularity(dataset).write_parquet(temporary)


def figures(dataset: Dataset, date: str, *, before: Path | None, data_before: Path | None) -> DataFigures:
    """Figures of ``dataset`` at the end of ``date``.

    ``before``: ``popularity.parquet`` of the published version; ``data_before``: its prepared data, where they are
    still there and not those of ``dataset``. None: not known.
    """
    now, names = popularity(dataset), set(dataset.items.external_ids)
    earlier = pl.read_parquet(before) if before is not None and before.is_file() else None
    known = set(earlier[EXTERNAL_ID].to_list()) if earlier is not None else None
    newest = max(int(getattr(dataset, split).time_N.max()) for split in SPLITS)
    dated = _FIRST_TIME <= newest < _LAST_TIME
    end = datetime.fromisoformat(date).replace(tzinfo=UTC) + timedelta(days=1)
    time = datetime.fromtimestamp(newest, tz=UTC) if dated else None
    users = None if dataset.users is None else set(dataset.users[EXTERNAL_ID].to_pylist())
    return DataFigures(
        newest_interaction=time.isoformat() if time else None,
        age_days=round((end - time).total_seconds() / 86_400, 3) if time else None,
        items=len(names),
        new_items=None if known is None else len(names - known) / len(names),
        gone_items=None if known is None else len(known - names) / max(len(known), 1),
        users=None if users is None else len(users),
        new_users=_share_of_new(users, data_before),
        popularity_drift=None if earlier is None else divergence(earlier, now),
        valid_drift=divergence(now, popularity(dataset, "valid")),
    )


def divergence(ours: pl.DataFrame, theirs: pl.DataFrame) -> float:
    """Jensen-Shannon divergence, in bits, of two tables of interactions per item; items are matched by external id.

    ``H((p + q) / 2) - (H(p) + H(q)) / 2`` with the entropy H to base 2 (Lin 1991, doi 10.1109/18.61115). 1 for a table
    without interactions.
    """
    both = ours.join(theirs, on=EXTERNAL_ID, how="full", coalesce=True, suffix="_theirs").fill_null(0)
    p_I, q_I = (both[name].to_numpy().astype(float) for name in (INTERACTIONS, f"{INTERACTIONS}_theirs"))
    if not p_I.sum() or not q_I.sum():
        return 1.0
    p_I, q_I = p_I / p_I.sum(), q_I / q_I.sum()
    found = _entropy((p_I + q_I) / 2) - (_entropy(p_I) + _entropy(q_I)) / 2
    return float(min(max(found, 0.0), 1.0))


def _entropy(p_I: np.ndarray) -> float:
    p_I = p_I[p_I > 0]
    return float(-(p_I * np.log2(p_I)).sum())


def _share_of_new(users: set[str] | None, data_before: Path | None) -> float | None:
    file = data_before / USERS_FILE if data_before is not None else None
    if not users or file is None or not file.is_file():
        return None
    known = set(pl.read_parquet(file, columns=[EXTERNAL_ID])[EXTERNAL_ID].to_list())
    return len(users - known) / len(users)
