"""What a further evaluation measures for each row (``eval.candidates``, ``auc``, ``grounding``): means and a table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from tawin_nemo.data.interactions import Dataset
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.intervals import share_interval
from tawin_nemo.eval.result import named_rows
from tawin_nemo.util.files import atomic_path, write_json


@dataclass(frozen=True, eq=False)
class Measured:
    """Means over the measured rows with 95 % intervals, and the per-user table they come from."""

    kind: str  # candidates, auc or grounding: the files are SPLIT.KIND.json and SPLIT.KIND.parquet
    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_user: pl.DataFrame  # row, user, target, further keys, then one column per mean

    @classmethod
    def of(cls, kind: str, samples: Samples, measured: dict[str, np.ndarray], **keys: np.ndarray) -> Measured:
        """From one value per row of ``samples`` for each name, all in [0, 1]; ``keys`` are columns without a mean."""
        intervals = {name: share_interval(values_B) for name, values_B in measured.items()}
        rows = {"row": samples.row_N, "user": samples.user_N, "target": samples.target_N}
        return cls(
            kind,
            means={name: interval.mean for name, interval in intervals.items()},
            intervals={name: (interval.low, interval.high) for name, interval in intervals.items()},
            per_user=pl.DataFrame(rows | keys | measured),
        )

    def named(self, dataset: Dataset) -> Measured:
        """This result with external ids in ``per_user``, as ``result.named_rows`` adds them."""
        return replace(self, per_user=named_rows(self.per_user, dataset))

    def write(self, directory: Path, split: str) -> None:
        """Write the table, then the means and intervals, so that a JSON file is never without its table."""
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_path(directory / f"{split}.{self.kind}.parquet") as temporary:
            self.per_user.write_parquet(temporary)
        facts = {"rows": self.per_user.height, "means": self.means, "intervals": self.intervals}
        write_json(directory / f"{split}.{self.kind}.json", facts)
