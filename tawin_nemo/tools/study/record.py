"""The files of a finished run: everything that tables, paired tests and plots need, small enough to be committed.

``ARM.seedN.json`` holds the recipe and the means, ``ARM.seedN.npz`` beside it the rank of every user's target. So each
Recall@K and NDCG@K up to the number of beams, and each paired test, can be made again from these files alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl

from tawin_nemo.eval.paired import is_measured, metric_values, parse_metric
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.files import atomic_path, sha256, write_json

FAILED = ".failed.json"
#: In front of the names of measured values in the file of ranks.
MEASURED_PREFIX = "measured."
#: What reading a damaged run file or its ranks may raise.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile)
#: Parts of a run whose means are kept of each logged scalar.
_PARTS = 10
#: Metrics are made again from ranks when a file is read; more than this is not rounding.
_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class SplitResult:
    """One evaluation: means over users, and the ranks they come from."""

    rows: int
    beams: int
    collision: str
    invalid_rate: float
    means: dict[str, float]
    facts: dict[str, float]  # the other numbers of eval/SPLIT.json
    per_user_sha256: str  # of eval/SPLIT.per_user.parquet
    rows_sha256: str  # of users and targets: runs with the same one may be paired
    rank_B: np.ndarray  # 0-based, -1 = not listed
    sharing_B: np.ndarray | None  # items on the target's path, None = 1 everywhere
    measured: dict[str, np.ndarray] = field(default_factory=dict)  # of further evaluations, of each user, [B] float64

    def values(self, metric: str) -> np.ndarray:
        """``recall@K``, ``ndcg@K`` or a measured value of each user. [B]. Raises DataError for a missing one."""
        if is_measured(metric):
            if metric not in self.measured:
                raise DataError(f"{metric} was not measured; set eval.candidates, eval.grounding or eval.auc and run")
            return self.measured[metric]
        k = parse_metric(metric)[1]
        if k > self.beams:
            raise DataError(f"{metric} needs a list of {k} items, but eval.beams was {self.beams}; run with more beams")
        return metric_values(metric, self.rank_B, self.sharing_B if self.shares_credit else None)

    def matches(self, metric: str) -> np.ndarray:
        """``values`` with a hit on a path that several items share counted in full, as in MiniOneRec's evaluation."""
        return replace(self, sharing_B=None).values(metric)  # what was measured has its own rule

    @property
    def shares_credit(self) -> bool:
        """Whether some hit is worth less than 1 because its path leads to several items."""
        return self.sharing_B is not None and self.collision == "fractional"


@dataclass(frozen=True)
class ParentRun:
    """The run whose weights this run started from."""

    run: str  # STUDY/ARM.seedN
    recipe_hash: str


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A finished run."""

    study: str
    arm: str
    seed: int
    stage: str
    steps: int  # optimizer steps or rollouts that the stage took
    chosen_step: int  # the checkpoint that was evaluated
    wall_s: float  # training and evaluation, all attempts
    command: str
    commit: str
    date: str
    hardware: dict[str, Any]
    recipe_hash: str
    settings: dict[str, Any]  # every recipe key but those of the machine and of the run's folders
    parent: ParentRun | None
    splits: dict[str, SplitResult]
    curves: dict[str, list[list[float]]]  # [step, value] of each logged valid/*
    training: dict[str, float]  # means of the other logged scalars over all steps
    process_s: float = 0.0  # the last attempt from start to end, imports and data included
    trends: dict[str, list[float]] = field(default_factory=dict)  # the same scalars, means of up to ten equal parts

    def write(self, path: Path) -> None:
        """Write both files, the ranks first: where the JSON is, the ranks are too."""
        arrays: dict[str, Any] = {}
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        content |= {"parent": asdict(self.parent) if self.parent else None, "splits": {}}
        for name, split in self.splits.items():
            values = {item.name: getattr(split, item.name) for item in fields(split)}
            arrays |= {f"{name}.{MEASURED_PREFIX}{key}": array_B for key, array_B in values.pop("measured").items()}
            for key in ("rank_B", "sharing_B"):
                array_B = values.pop(key)
                if array_B is not None:
                    arrays[f"{name}.{key}"] = array_B.astype(np.int32)
            content["splits"][name] = values
        with atomic_path(ranks_file(path)) as temporary:
            np.savez_compressed(temporary, **arrays)
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """What ``write`` wrote. Raises DataError when it is damaged, or its means are not those of its ranks."""
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            content["parent"] = ParentRun(**content["parent"]) if content["parent"] else None
            parts = {name: {**_arrays(path, name, split), **split} for name, split in content["splits"].items()}
            content["splits"] = {name: SplitResult(**part) for name, part in parts.items()}
            record = cls(**content)
        except _DAMAGE as error:
            raise DataError(f"{path} is not a run file: {error}; delete it and run the study again") from error
        for name, split in record.splits.items():
            for metric, mean in split.means.items():
                if len(split.rank_B) != split.rows or abs(float(split.values(metric).mean()) - mean) > _TOLERANCE:
                    raise DataError(f"{path}: {name} {metric} = {mean} is not what its {split.rows} ranks give")
        return record


def ranks_file(path: Path) -> Path:
    """The file of ranks that belongs to the run file ``path``."""
    return path.with_suffix(".npz")


def _arrays(path: Path, name: str, split: dict[str, Any]) -> dict[str, Any]:
    """``rank_B`` and ``sharing_B`` of a split, int64; older run files hold them as text, which is taken out."""
    if "rank" in split:
        texts = {"rank_B": split.pop("rank"), "sharing_B": split.pop("sharing")}
        return {key: None if text is None else unpack(text) for key, text in texts.items()}
    with np.load(ranks_file(path)) as arrays:
        sharing_B = arrays[f"{name}.sharing_B"].astype(np.int64) if f"{name}.sharing_B" in arrays else None
        begin = f"{name}.{MEASURED_PREFIX}"
        measured = {key.removeprefix(begin): arrays[key] for key in arrays.files if key.startswith(begin)}
        return {"rank_B": arrays[f"{name}.rank_B"].astype(np.int64), "sharing_B": sharing_B, "measured": measured}


def unpack(text: str) -> np.ndarray:
    """Whole numbers from base64 of zlib of int16 ("i2:...") or int32 ("i4:..."). [B] int64.

    Raises ValueError or zlib.error for anything else.
    """
    kind, _, data = text.partition(":")
    if kind not in ("i2", "i4"):
        raise ValueError(f"packed numbers start with i2: or i4:, not {kind[:8]!r}")
    return np.frombuffer(zlib.decompress(base64.b64decode(data, validate=True)), dtype=f"<{kind}").astype(np.int64)


@dataclass(frozen=True)
class FailedRun:
    """A run that ended with an error."""

    study: str
    arm: str
    seed: int
    command: str
    commit: str
    date: str
    exit_code: int
    log_tail: list[str]

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> FailedRun:
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} is not the file of a failed run: {error}; delete it") from error


def read_folder(folder: Path) -> tuple[dict[tuple[str, int], RunRecord], dict[tuple[str, int], FailedRun]]:
    """All run files of a study, finished and failed, by arm and seed; sorted by name."""
    finished, failed = {}, {}
    for path in sorted(folder.glob("*.seed*.json")):
        if path.name.endswith(FAILED):
            failure = FailedRun.read(path)
            failed[failure.arm, failure.seed] = failure
        else:
            record = RunRecord.read(path)
            finished[record.arm, record.seed] = record
    return finished, {key: failure for key, failure in failed.items() if key not in finished}


# -- from a run directory ------------------------------------------------------------------------------------------
def final_stage(run_dir: Path) -> Path | None:
    """Directory of the last stage of a finished run; None when the run is not finished or its files are gone."""
    summary = run_dir / "summary.json"
    if not summary.is_file():
        return None
    name = json.loads(summary.read_text(encoding="utf-8")).get("final_stage", "")
    return run_dir / name if name and (run_dir / name / "done.json").is_file() else None


def read_stage(stage: Path, splits: list[str]) -> dict[str, Any]:
    """What a finished stage directory gives a RunRecord: stage, steps, wall_s, splits, curves, training, trends.

    Raises DataError when an evaluation is missing or damaged.
    """
    done = json.loads((stage / "done.json").read_text(encoding="utf-8"))
    summary = json.loads((stage.parent / "summary.json").read_text(encoding="utf-8"))
    curves, others = _logged(stage / "metrics.jsonl")
    return {
        "stage": stage.name,
        "steps": int(done["step"]),
        "chosen_step": int(done.get("chosen_step", done["step"])),
        "wall_s": float(summary["wall_s"]),
        "splits": {name: _read_split(stage / "eval", name) for name in splits},
        "curves": curves,
        "training": {name: fmean(values) for name, values in others.items()},
        "trends": {name: part_means(values) for name, values in others.items()},
    }


def _read_split(directory: Path, name: str) -> SplitResult:
    result = EvalResult.read(directory, name)
    table = result.per_user
    sharing_B = table["sharing"].to_numpy()
    keys = np.ascontiguousarray(table.select("row", "user", "target").to_numpy(), dtype="<i8")
    raw = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
    known = ("rows", "beams", "invalid_rate", "means", "intervals")
    return SplitResult(
        rows=result.rows,
        beams=result.beams,
        collision=result.collision,
        invalid_rate=result.invalid_rate,
        means=dict(result.means),
        facts=_numbers({key: value for key, value in raw.items() if key not in known}),
        per_user_sha256=sha256(directory / f"{name}.per_user.parquet"),
        rows_sha256=hashlib.sha256(keys.tobytes()).hexdigest(),
        rank_B=table["rank"].to_numpy(),
        sharing_B=sharing_B if (sharing_B > 1).any() else None,
        measured=_measured(directory, name, result.rows),
    )


def _measured(directory: Path, name: str, rows: int) -> dict[str, np.ndarray]:
    """Values of each row of ``SPLIT.candidates.parquet`` and the like, where they hold all rows."""
    paths = [directory / f"{name}.{kind}.parquet" for kind in ("candidates", "auc", "grounding")]
    tables = [table for path in paths if path.is_file() and (table := pl.read_parquet(path)).height == rows]
    columns = {name: table[name] for table in tables for name in table.columns if is_measured(name)}
    return {name: column.cast(pl.Float64).to_numpy() for name, column in columns.items()}


def _numbers(node: Mapping[str, Any]) -> dict[str, float]:
    """All numbers below ``node`` by their own names; ``{"beyond": {"diversity@10": 1}}`` -> ``{"diversity@10": 1}``."""
    numbers: dict[str, float] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            numbers |= _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[key] = value
    return numbers


def part_means(values: Sequence[float]) -> list[float]:
    """Means of ten parts of equal length, first to last; of fewer parts when there are fewer values.

    >>> part_means([1.0, 2.0]), part_means(range(20))[:2]
    ([1.0, 2.0], [0.5, 2.5])
    """
    parts = np.array_split(np.asarray(values, dtype=np.float64), min(_PARTS, len(values)))
    return [float(f"{part.mean():.6g}") for part in parts]


def _logged(path: Path) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    curves: dict[str, list[list[float]]] = {}
    others: dict[str, list[float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in map(json.loads, lines):
        for name, value in line.items():
            if name.startswith("valid/"):
                curves.setdefault(name, []).append([line["step"], value])
            elif name not in ("step", "epoch") and isinstance(value, int | float):
                others.setdefault(name, []).append(value)
    return curves, others
