"""What a study file says: one recipe, arms that change some of its keys, seeds, and what to compare.

Reading is strict: an unknown key, a wrong type or an arm that does not exist is a ConfigError that names the nearest
valid word. ``read_study`` reads, ``tawin_nemo/tools/study/arms.py`` unfolds grids and orders the arms.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tawin_nemo.config.load import FREE_FORM, leaf_fields
from tawin_nemo.config.schema import Recipe, number, opt
from tawin_nemo.eval.paired import parse_metric
from tawin_nemo.util.errors import ConfigError

#: What an arm may hold besides recipe keys.
ARM_WORDS = ("after", "grid", "seeds")
#: Recipe keys that the study sets itself.
OWN_KEYS = ("seed", "name", "run_dir", "checkpoint")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Sweep:
    """A metric against one grid key; the other grid keys give one line each."""

    arm: str = opt("", "an arm with a grid")
    x: str = opt("", "the grid key on the axis, e.g. rl.tawin.anchor; its values must be numbers")
    metrics: list[str] = opt([], "one panel each (empty = the study's metrics)")
    beside: list[str] = opt([], "arms drawn as horizontal lines, e.g. sft_continued")
    minus: str = opt("", "an arm: show paired differences to it, whose intervals are far narrower")


@dataclass(frozen=True)
class StudyFile:
    """The keys of a study file; ``key=value`` on the command line overrides them."""

    study: str = opt("", "name of the study")
    about: str = opt("", "what it asks, in words; the first lines of its results page")
    recipe: str = opt("", "recipe of all arms, relative to the study file")
    set: dict[str, Any] = opt({}, "recipe keys of all arms, e.g. data.root")
    seeds: list[int] = opt([1], "seeds of all arms; an arm may have its own")
    splits: list[str] = opt(["valid"], "eval.splits of all arms; choices are made on valid")
    arms: dict[str, Any] = opt({}, "name: {recipe keys, after: ARM or STUDY/ARM, grid: {key: [values]}, seeds: [..]}")
    shared_from: str = opt("", "study whose arms `after` may name as if they were of this one")
    compare: list[Any] = opt([], "[[ours, theirs], ...] for paired tests; a grid's name means all of its arms")
    metrics: list[str] = opt(["recall@1", "recall@3", "ndcg@3", "recall@10"], "columns of the tables")
    facts: list[str] = opt([], "further columns: other numbers of eval/SPLIT.json, e.g. coverage")
    trends: list[str] = opt([], "logged scalars to show from the first to the last tenth of training, e.g. rl/reward")
    pool: bool = opt(False, "also test on valid and test together (only if nothing was selected on them)")
    sweeps: list[Sweep] = field(default_factory=list, metadata={"help": "plots and tables of a grid"})
    curves: list[str] = opt([], "logged scalars to plot over steps, e.g. valid/recall@3")
    workers: int = number(0, 0, help="runs at once, one core each (0 = cores)")
    commit: bool = opt(False, "git commit each run file as soon as it exists, and nothing else")
    results: str = opt("", "folder of the run files and the results page (empty = recipes/results/STUDY)")
    run_root: str = opt("", "folder of the run directories (empty = runs/studies/STUDY)")
    report: bool = opt(False, "run nothing: only write the results page and the plots from the run files")


@dataclass(frozen=True)
class ArmFile:
    """One entry of ``arms`` as it is written: before grids are unfolded."""

    name: str
    keys: Mapping[str, Any]  # dotted recipe keys
    grid: Mapping[str, Sequence[Any]]
    after: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class StudyText:
    """A study file as it is written, its flat parts checked."""

    path: Path
    file: StudyFile
    keys: Mapping[str, Any]  # ``set``, dotted
    arms: tuple[ArmFile, ...]


def read_study(path: str | Path | None, overrides: Sequence[str] = ()) -> StudyText:
    """The study in ``path`` with ``key=value`` overrides (``set.data.root=DIR``, ``seeds=[1]``, ``arms.a.rl.lr=1e-5``).

    Raises ConfigError for a missing file, an unknown key, a wrong type or an entry that cannot be used.
    """
    if path is None:
        raise ConfigError("study needs --recipe FILE, a study file; for example recipes/studies/smoke.yaml")
    path = Path(path)
    layers = [_read_yaml(path), _read_overrides(overrides)]
    set_keys: dict[str, Any] = {}
    arms: dict[str, dict[str, Any]] = {}
    merged: Any = OmegaConf.structured(StudyFile)
    for layer, where in zip(layers, (str(path), "the command line"), strict=True):
        require_known(layer, [item.name for item in dataclasses.fields(StudyFile)], where)
        set_keys |= flat(_mapping(layer.pop("set", {}), "set", where))
        for name, entry in _mapping(layer.pop("arms", {}), "arms", where).items():
            _merge_arm(arms.setdefault(str(name), {}), _mapping(entry or {}, f"arms.{name}", where))
        for sweep in layer.get("sweeps") or []:
            words = [item.name for item in dataclasses.fields(Sweep)]
            require_known(_mapping(sweep, "sweeps", where), words, f"sweeps of {where}")
        try:
            OmegaConf.set_readonly(merged, False)
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "a value"
            value = layer.get(str(key).split("[")[0].split(".")[0])
            raise ConfigError(f"{key} in {where}: {str(error).splitlines()[0]} (the value is {value!r})") from None
    file: Any = OmegaConf.to_object(merged)
    text = StudyText(path, file, set_keys, tuple(_arm(name, entry, path) for name, entry in arms.items()))
    _check(text)
    return text


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"study file not found: {path}{hint}")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # yaml raises many types; each is a mistake in the file
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    return _plain(loaded, str(path))


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override {item!r} has no '='; write key=value, for example set.data.root=DIR")
    try:
        return _plain(OmegaConf.from_dotlist(list(overrides)), "the command line")
    except ConfigError:
        raise
    except Exception as error:  # a value that YAML cannot parse
        raise ConfigError(f"override not understood: {error}") from None


def _plain(loaded: Any, where: str) -> dict[str, Any]:
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{where} must hold `key: value` lines, found a list")
    return {str(key): value for key, value in (OmegaConf.to_container(loaded, resolve=True) or {}).items()}  # type: ignore[union-attr]


def _mapping(value: Any, key: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value} in {where} must hold `key: value` lines")
    return value


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested and dotted keys alike as dotted ones.

    >>> flat({"rl": {"lr": 1, "tawin.k": 2}, "seed": 3})
    {'rl.lr': 1, 'rl.tawin.k': 2, 'seed': 3}
    """
    result: dict[str, Any] = {}
    for name, value in node.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result


def _merge_arm(arm: dict[str, Any], entry: dict[str, Any]) -> None:
    """A later layer's entry over an earlier one's, key by key."""
    for word in ("after", "seeds"):
        if word in entry:
            arm[word] = entry[word]
    keys = {name: value for name, value in entry.items() if name not in ARM_WORDS}
    arm["keys"] = {**arm.get("keys", {}), **flat(keys)}
    arm["grid"] = {**arm.get("grid", {}), **flat(_mapping(entry.get("grid") or {}, "grid", "an arm"))}


def _arm(name: str, entry: dict[str, Any], path: Path) -> ArmFile:
    where = f"arm {name} of {path}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a name holds letters, digits and _.+- only")
    for key, values in entry["grid"].items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid {key}={values} in {where} must be a list of values, e.g. [0, 1, 2]")
    seeds = entry.get("seeds", [])
    if not isinstance(seeds, list) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise ConfigError(f"seeds={seeds} in {where} must be a list of whole numbers >= 0")
    after = entry.get("after", "")
    if not isinstance(after, str):
        raise ConfigError(f"after={after} in {where} must name one arm")
    return ArmFile(name, entry["keys"], entry["grid"], after, tuple(seeds))


def _check(text: StudyText) -> None:
    file, path = text.file, text.path
    if not _NAME.fullmatch(file.study):
        raise ConfigError(f"study={file.study!r} in {path}: name the study with letters, digits and _.+- only")
    if not file.recipe:
        raise ConfigError(f"recipe is missing in {path}; name the recipe of all arms, relative to the study file")
    if not text.arms:
        raise ConfigError(f"arms is empty in {path}; write at least one, e.g. arms: {{sft: {{rl.enabled: false}}}}")
    if not file.seeds or min(file.seeds) < 0:
        raise ConfigError(f"seeds={list(file.seeds)} in {path} must hold whole numbers >= 0")
    if file.shared_from and not _NAME.fullmatch(file.shared_from):
        raise ConfigError(f"shared_from={file.shared_from} in {path} must be the name of a study")
    for metric in [*file.metrics, *(metric for sweep in file.sweeps for metric in sweep.metrics)]:
        parse_metric(metric)
    if file.workers < 0:
        raise ConfigError(f"workers={file.workers} in {path} must be >= 0 (0 = cores)")
    recipe_keys(text.keys, f"set of {path}")
    for arm in text.arms:
        recipe_keys({**arm.keys, **arm.grid}, f"arm {arm.name} of {path}")


def recipe_keys(keys: Iterable[str], where: str) -> None:
    """Raises ConfigError for a key that no recipe has, or that the study sets itself."""
    valid = [key for key, _ in leaf_fields(Recipe)]
    for key in keys:
        if key in OWN_KEYS:
            raise ConfigError(f"{key} in {where} is set by the study; use seeds, run_root or the arm's name")
        if key.split(".")[0] not in FREE_FORM:
            require_known([key], [*valid, *ARM_WORDS] if where.startswith("arm ") else valid, where)


def require_known(found: Iterable[str], valid: Sequence[str], where: str) -> None:
    """Raises ConfigError for a word that is not valid; it names the nearest that is."""
    for name in found:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(list(valid)[:20])}"
            raise ConfigError(f"unknown key {name} in {where}; {hint}")
