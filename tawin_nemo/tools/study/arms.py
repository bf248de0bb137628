"""The arms of a study file: grids unfolded, ``after`` resolved, parents before children."""

from __future__ import annotations

import graphlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tawin_nemo.tools.study.config import StudyFile, Sweep, nearest, read_file
from tawin_nemo.util.errors import ConfigError


@dataclass(frozen=True)
class Parent:
    """The arm whose final stage another arm starts from; ``study`` is empty for the same study."""

    study: str
    arm: str


@dataclass(frozen=True)
class Arm:
    """One way of training, at one point of its grid; one run per seed."""

    name: str  # tawin[anchor=0,window=centred]
    base: str  # tawin
    point: Mapping[str, Any] = field(default_factory=dict)  # grid key -> value
    keys: Mapping[str, Any] = field(default_factory=dict)  # dotted recipe keys, the grid's included
    parent: Parent | None = None
    seeds: tuple[int, ...] = ()

    @property
    def slug(self) -> str:
        """The name without brackets, for files: many programs take ``[a]`` in a path for a pattern."""
        return file_slug(self.name)


@dataclass(frozen=True)
class Study:
    """A study ready to be planned; arms stand in an order in which parents come first."""

    path: Path
    file: StudyFile
    keys: Mapping[str, Any]  # recipe keys of all arms, dotted
    arms: tuple[Arm, ...]
    pairs: tuple[tuple[str, str], ...]  # arms to compare; a name with "/" is another study's

    @property
    def recipe(self) -> Path:
        return self.path.parent / self.file.recipe

    @property
    def results(self) -> Path:
        return Path(self.file.results or f"recipes/results/{self.file.study}")

    @property
    def run_root(self) -> Path:
        return Path(self.file.run_root or f"runs/studies/{self.file.study}")

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def file_slug(name: str) -> str:
    """
    >>> file_slug("tawin[anchor=0,window=start]")
    'tawin.anchor=0,window=start'
    """
    return name.replace("[", ".").replace("]", "")


def read_study(path: str | Path | None, overrides: Sequence[str] = ()) -> Study:
    """The study in ``path`` with ``key=value`` overrides (``set.data.root=DIR``, ``seeds=[1]``, ``arms.a.rl.lr=1e-5``).

    Raises ConfigError for a mistake in the file, for names that clash, for an arm that does not exist and for arms that
    start from each other.
    """
    if path is None:
        raise ConfigError("study needs --recipe FILE, a study file; for example recipes/studies/smoke.yaml")
    path = Path(path)
    file, keys, entries = read_file(path, overrides)
    arms = [arm for name, entry in entries.items() for arm in _unfold(name, entry, file, f"arm {name} of {path}")]
    slugs = [arm.slug for arm in arms]
    clashing = sorted({arm.name for arm in arms if slugs.count(arm.slug) > 1})
    if clashing:
        raise ConfigError(f"arms of {path} would share their files: {', '.join(clashing)}; rename one of them")
    arms = [_with_parent(arm, entries[arm.base].get("after", ""), arms, file, path) for arm in arms]
    names = [arm.name for arm in arms]
    pairs = [pair for entry in file.compare for pair in _pairs(entry, names, f"compare of {path}")]
    for sweep in file.sweeps:
        _check_sweep(sweep, arms, f"sweeps of {path}")
    return Study(path, file, keys, tuple(_parents_first(arms, path)), tuple(dict.fromkeys(pairs)))


def _unfold(name: str, entry: Mapping[str, Any], file: StudyFile, where: str) -> list[Arm]:
    """One arm per point of the grid, in the order of the lists; without a grid the arm itself. Parents are not set."""
    grid = {key.removeprefix("grid."): values for key, values in entry.items() if key.startswith("grid.")}
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid {key}={values} in {where} must be a list of values, e.g. [0, 1, 2]")
    seeds, after = entry.get("seeds", []), entry.get("after", "")
    if not isinstance(seeds, list) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise ConfigError(f"seeds={seeds} in {where} must be a list of whole numbers >= 0")
    if not isinstance(after, str):
        raise ConfigError(f"after={after} in {where} must name one arm")
    keys = {key: value for key, value in entry.items() if key not in ("after", "seeds") and not key.startswith("grid.")}
    last = [key.rsplit(".", 1)[-1] for key in grid]
    short = [word if last.count(word) == 1 else key for key, word in zip(grid, last, strict=True)]
    arms = []
    for values in itertools.product(*grid.values()):
        label = ",".join(f"{key}={label_of(value)}" for key, value in zip(short, values, strict=True))
        point = dict(zip(grid, values, strict=True))
        own_seeds = tuple(seeds or file.seeds)
        arms.append(Arm(f"{name}[{label}]" if grid else name, name, point, {**keys, **point}, None, own_seeds))
    return arms


def label_of(value: Any) -> str:
    """A grid value as it stands in an arm's name.

    >>> [label_of(value) for value in (True, 0.5, 1e-4, "start", ["valid", "test"])]
    ['true', '0.5', '0.0001', 'start', 'valid+test']
    """
    if isinstance(value, list):
        return "+".join(label_of(entry) for entry in value)
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)


def _with_parent(arm: Arm, after: str, arms: Sequence[Arm], file: StudyFile, path: Path) -> Arm:
    if not after:
        return arm
    where = f"after={after} in arm {arm.name} of {path}"
    if "start" in arm.keys:
        raise ConfigError(f"arm {arm.name} of {path} has both after={after} and start; leave one of them out")
    study, _, name = after.rpartition("/")
    if not study:
        here = {other.name: other for other in arms}
        grid = [other.name for other in arms if other.base == name and other.point]
        if name in here:
            missing = sorted(set(arm.seeds) - set(here[name].seeds))
            if missing:
                raise ConfigError(f"arm {arm.name} of {path} has seeds {missing} that its after={after} does not have")
        elif grid:
            raise ConfigError(f"{where} is a grid; name one of {', '.join(grid)}")
        elif not file.shared_from:
            raise ConfigError(f"{where} is not an arm (of another study: STUDY/ARM); {nearest(name, list(here))}")
        else:
            study = file.shared_from
    return replace(arm, parent=Parent(study, name))


def _parents_first(arms: Sequence[Arm], path: Path) -> list[Arm]:
    """First the arms that wait for nobody, then their children, each generation in the order of the file."""
    parents = {arm.name: [arm.parent.arm] if arm.parent and not arm.parent.study else [] for arm in arms}
    try:
        order = list(graphlib.TopologicalSorter(parents).static_order())
    except graphlib.CycleError as error:
        raise ConfigError(f"arms of {path} wait for each other: {' -> '.join(error.args[1])}") from None
    return sorted(arms, key=lambda arm: order.index(arm.name))


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Names that are ``pattern``, are a point of the grid ``pattern``, or fit it with ``*`` for any text.

    A pattern with "/" names an arm of another study and is returned as it is.

    >>> matching("a", ["a[x=1]", "a[x=2]", "ab"]), matching("a*x=2*", ["a[x=1]", "a[x=2]", "ab"])
    (['a[x=1]', 'a[x=2]'], ['a[x=2]'])
    """
    if pattern in names or "/" in pattern:
        return [pattern]
    expression = re.compile(re.escape(pattern).replace(r"\*", ".*"))
    return [name for name in names if name.split("[")[0] == pattern or expression.fullmatch(name)]


def _require_match(pattern: str, names: Sequence[str], where: str) -> list[str]:
    matches = matching(pattern, names)
    if not matches:
        valid = list(dict.fromkeys([*names, *(name.split("[")[0] for name in names)]))
        raise ConfigError(f"{pattern} in {where} is not an arm; {nearest(pattern, valid)}")
    return matches


def _pairs(entry: Any, names: Sequence[str], where: str) -> list[tuple[str, str]]:
    """All pairs that one entry of ``compare`` means; two grids with the same points are paired point by point."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)):
        raise ConfigError(f"{entry} in {where} must be [ours, theirs], two names of arms")
    ours, theirs = (_require_match(name, names, where) for name in entry)
    points = [{name.partition("[")[2] for name in side} for side in (ours, theirs)]
    pointwise = len(ours) > 1 and points[0] == points[1]
    same_point = [(a, b) for a in ours for b in theirs if a.partition("[")[2] == b.partition("[")[2]]
    return same_point if pointwise else [(a, b) for a in ours for b in theirs if a != b]


def _check_sweep(sweep: Sweep, arms: Sequence[Arm], where: str) -> None:
    points = [arm.point for arm in arms if arm.base == sweep.arm]
    if not points:
        raise ConfigError(f"arm={sweep.arm} in {where} is not an arm")
    if sweep.x not in points[0]:
        keys = ", ".join(points[0]) or "none"
        raise ConfigError(f"x={sweep.x} in {where} is not a grid key of arm {sweep.arm}: {keys}")
    for point in points:
        value = point[sweep.x]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"x={sweep.x} in {where} takes the value {value!r}; a sweep needs numbers")
    names = [arm.name for arm in arms]
    for pattern in [*sweep.beside, *([sweep.minus] if sweep.minus else [])]:
        _require_match(pattern, names, where)
    if sweep.minus and "/" not in sweep.minus and sweep.minus not in names:
        raise ConfigError(f"minus={sweep.minus} in {where} must be one arm, not a grid")
