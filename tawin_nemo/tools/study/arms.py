"""From the written study to its arms: grids unfolded, ``after`` resolved, parents before children."""

from __future__ import annotations

import difflib
import graphlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tawin_nemo.tools.study.config import ArmFile, StudyFile, StudyText
from tawin_nemo.util.errors import ConfigError

_UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]+")


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
    keys: Mapping[str, Any]  # of all arms
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

    @property
    def shown_path(self) -> str:
        """The study file without the folders of this machine."""
        return "/".join(self.path.resolve().parts[-3:])

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def matching(self, pattern: str) -> list[str]:
        return matching(pattern, [arm.name for arm in self.arms])


def file_slug(name: str) -> str:
    """
    >>> file_slug("tawin[anchor=0,window=start]")
    'tawin.anchor=0,window=start'
    """
    return name.replace("[", ".").replace("]", "")


def unfold(text: StudyText) -> Study:
    """Raises ConfigError when names clash, an arm that is named does not exist, or arms wait for each other."""
    file = text.file
    arms = [arm for written in text.arms for arm in _unfold_arm(written, file)]
    slugs = [arm.slug for arm in arms]
    twice = sorted({arm.name for arm, slug in zip(arms, slugs, strict=True) if slugs.count(slug) > 1})
    if twice:
        raise ConfigError(f"arms of {text.path} would share their files: {', '.join(twice)}; rename one of them")
    arms = [_with_parent(arm, written_after(text, arm), arms, text) for arm in arms]
    names = [arm.name for arm in arms]
    pairs = [pair for entry in file.compare for pair in _pairs(entry, names, text.path)]
    for sweep in file.sweeps:
        _check_sweep(sweep.arm, sweep.x, arms, text.path)
        for pattern in [*sweep.beside, *([sweep.minus] if sweep.minus else [])]:
            _require_match(pattern, names, f"sweeps of {text.path}")
        if sweep.minus and "/" not in sweep.minus and sweep.minus not in names:
            raise ConfigError(f"minus={sweep.minus} in sweeps of {text.path} must be one arm, not a grid")
    return Study(text.path, file, text.keys, tuple(_parents_first(arms, text.path)), tuple(dict.fromkeys(pairs)))


def written_after(text: StudyText, arm: Arm) -> str:
    return next(written.after for written in text.arms if written.name == arm.base)


def _unfold_arm(written: ArmFile, file: StudyFile) -> list[Arm]:
    """One arm per point of the grid, in the order of the lists; without a grid the arm itself."""
    seeds = written.seeds or tuple(file.seeds)
    if not written.grid:
        return [Arm(written.name, written.name, {}, written.keys, None, seeds)]
    short = _short_keys(list(written.grid))
    arms = []
    for values in itertools.product(*written.grid.values()):
        point = dict(zip(written.grid, values, strict=True))
        label = ",".join(f"{short[key]}={label_of(value)}" for key, value in point.items())
        arms.append(Arm(f"{written.name}[{label}]", written.name, point, {**written.keys, **point}, None, seeds))
    return arms


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key where that is clear, else the whole key."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def label_of(value: Any) -> str:
    """A grid value as it stands in an arm's name.

    >>> [label_of(value) for value in (True, 0.5, 1e-4, "start", ["valid", "test"])]
    ['true', '0.5', '0.0001', 'start', 'valid+test']
    """
    if isinstance(value, list):
        return "+".join(label_of(entry) for entry in value)
    text = value if isinstance(value, str) else json.dumps(value)
    return _UNSAFE.sub("_", text)


def _with_parent(arm: Arm, after: str, arms: Sequence[Arm], text: StudyText) -> Arm:
    if not after:
        return arm
    if "start" in arm.keys:
        raise ConfigError(f"arm {arm.name} of {text.path} has both after={after} and start; leave one of them out")
    study, _, name = after.rpartition("/")
    here = {other.name: other for other in arms}
    grid = [other.name for other in arms if other.base == name and other.point]
    if not study and name in here:
        missing = sorted(set(arm.seeds) - set(here[name].seeds))
        if missing:
            raise ConfigError(f"arm {arm.name} of {text.path} has seeds {missing} that its after={after} does not have")
    elif not study and grid:
        raise ConfigError(f"after={after} in arm {arm.name} of {text.path} is a grid; name one of {', '.join(grid)}")
    elif not study and text.file.shared_from:
        study = text.file.shared_from
    elif not study:
        near = difflib.get_close_matches(name, here, n=1)
        hint = f"did you mean {near[0]}?" if near else "an arm of another study is written STUDY/ARM"
        raise ConfigError(f"after={after} in arm {arm.name} of {text.path} is not an arm; {hint}")
    return Arm(arm.name, arm.base, arm.point, arm.keys, Parent(study, name), arm.seeds)


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

    >>> matching("a", ["a[x=1]", "a[x=2]", "ab"])
    ['a[x=1]', 'a[x=2]']
    >>> matching("a*x=2*", ["a[x=1]", "a[x=2]", "ab"])
    ['a[x=2]']
    """
    if pattern in names:
        return [pattern]
    expression = re.compile(re.escape(pattern).replace(r"\*", ".*"))
    return [name for name in names if name.split("[")[0] == pattern or expression.fullmatch(name)]


def _require_match(pattern: str, names: Sequence[str], where: str) -> list[str]:
    if "/" in pattern:
        return [pattern]
    found = matching(pattern, names)
    if not found:
        near = difflib.get_close_matches(pattern, [*names, *(name.split("[")[0] for name in names)], n=1)
        hint = f"did you mean {near[0]}?" if near else f"arms: {', '.join(names[:20])}"
        raise ConfigError(f"{pattern} in {where} is not an arm; {hint}")
    return found


def _pairs(entry: Any, names: Sequence[str], path: Path) -> list[tuple[str, str]]:
    """All pairs that one entry of ``compare`` means; two grids with the same points are paired point by point."""
    where = f"compare of {path}"
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)):
        raise ConfigError(f"{entry} in {where} must be [ours, theirs], two names of arms")
    ours, theirs = (_require_match(name, names, where) for name in entry)
    points = [{name.partition("[")[2] for name in side} for side in (ours, theirs)]
    if len(ours) > 1 and points[0] == points[1]:
        return [(a, b) for a in ours for b in theirs if a.partition("[")[2] == b.partition("[")[2]]
    return [(a, b) for a in ours for b in theirs if a != b]


def _check_sweep(base: str, x: str, arms: Sequence[Arm], path: Path) -> None:
    points = [arm.point for arm in arms if arm.base == base]
    if not points:
        raise ConfigError(f"arm={base} in sweeps of {path} is not an arm")
    if x not in points[0]:
        raise ConfigError(
            f"x={x} in sweeps of {path} is not a grid key of arm {base}: {', '.join(points[0]) or 'none'}"
        )
    wrong = [point[x] for point in points if isinstance(point[x], bool) or not isinstance(point[x], int | float)]
    if wrong:
        raise ConfigError(f"x={x} in sweeps of {path} takes the value {wrong[0]!r}; a sweep needs numbers")
