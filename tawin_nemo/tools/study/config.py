"""A study file: one recipe, arms that change some of its keys, seeds, and what to compare.

Reading is strict: an unknown key, a wrong type or the name of an arm that does not exist raises a ConfigError with the
nearest valid word. ``tawin_nemo/tools/study/arms.py`` makes the arms of what is read here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tawin_nemo.config.load import FREE_FORM, leaf_fields
from tawin_nemo.config.schema import Recipe, number, opt
from tawin_nemo.eval.paired import check_metric
from tawin_nemo.util.errors import ConfigError

#: What an arm may hold besides recipe keys.
ARM_WORDS = ("after", "grid", "seeds")
#: Recipe keys that the study sets itself.
OWN_KEYS = ("seed", "name", "run_dir", "checkpoint")
LAUNCHERS = ("local", "slurm")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Sweep:
    """A metric against one grid key; the other grid keys give one line each."""

    arm: str = opt("", "an arm with a grid")
    x: str = opt("", "the grid key on the axis, e.g. rl.tawin.anchor; its values must be numbers")
    metrics: list[str] = opt([], "one panel each (empty = the study's metrics)")
    beside: list[str] = opt([], "arms drawn as horizontal lines, e.g. sft_continued")
    minus: str = opt("", "an arm: show paired differences to it, whose intervals are far narrower")

    @property
    def x_label(self) -> str:
        return self.x.rsplit(".", 1)[-1]


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
    metrics: list[str] = opt(
        ["recall@1", "recall@3", "ndcg@3", "recall@10"],
        "columns of the tables: recall@K, ndcg@K; with eval.candidates hit_ratio@1, valid_ratio, trie_hit_ratio@1; "
        "with eval.auc (of all rows) auc, opauc@10, opauc@50, wpauc",
    )
    facts: list[str] = opt([], "further columns: other numbers of eval/SPLIT.json, e.g. coverage")
    trends: list[str] = opt([], "logged scalars to show from the first to the last tenth of training, e.g. rl/reward")
    pool: bool = opt(False, "also test on valid and test together (only if nothing was selected on them)")
    sweeps: list[Sweep] = field(default_factory=list, metadata={"help": "plots and tables of a grid"})
    curves: list[str] = opt([], "logged scalars to plot over steps, e.g. valid/recall@3")
    workers: int = number(0, 0, help="runs at once, one core each (0 = cores; with launcher slurm: all)")
    launcher: str = opt("local", "local: processes of this machine; slurm: one job per run")
    sbatch: list[str] = opt([], "options of sbatch for the job of a run, e.g. [--gpus-per-node=8, --time=240]")
    commit: bool = opt(False, "git commit each run file as soon as it exists, and nothing else")
    results: str = opt("", "folder of the run files and the results page (empty = recipes/results/STUDY)")
    run_root: str = opt("", "folder of the run directories (empty = runs/studies/STUDY)")
    export: str = opt("", "folder for the tables as CSV and LaTeX (booktabs) as well; empty = none")
    report: bool = opt(False, "run nothing: only write the results page and the plots from the run files")


def read_file(path: Path, overrides: Sequence[str]) -> tuple[StudyFile, dict[str, Any], dict[str, dict[str, Any]]]:
    """The checked keys of a study file, the recipe keys of all arms, and each arm's entry.

    Recipe keys come dotted. An entry maps ``after``, ``seeds``, ``grid.KEY`` and recipe keys to their values.
    Raises ConfigError for a missing file, an unknown key, a wrong type or a value out of limits.
    """
    values: dict[str, Any] = {}
    common: dict[str, Any] = {}
    arms: dict[str, dict[str, Any]] = {}
    for layer, where in ((_read_yaml(path), str(path)), (_read_overrides(overrides), "the command line")):
        require_known(layer, [item.name for item in fields(StudyFile)], where)
        common |= flat(_mapping(layer.pop("set", None) or {}, "set", where))
        for name, entry in _mapping(layer.pop("arms", None) or {}, "arms", where).items():
            arms[str(name)] = arms.get(str(name), {}) | _arm_entry(entry or {}, f"arms.{name}", where)
        values |= layer
    for sweep in values.get("sweeps") or []:
        require_known(_mapping(sweep, "sweeps", str(path)), [item.name for item in fields(Sweep)], f"sweeps of {path}")
    try:
        schema = OmegaConf.structured(StudyFile)
        OmegaConf.set_readonly(schema, False)
        file: Any = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "a value")
        value = values.get(re.split(r"[.\[]", key)[0])
        raise ConfigError(f"{key} in {path}: {str(error).splitlines()[0]} (the value is {value!r})") from None
    _check(file, path, arms)
    _check_recipe_keys(common, f"set of {path}")
    for name, entry in arms.items():
        keys = [key.removeprefix("grid.") for key in entry if key not in ("after", "seeds")]
        _check_recipe_keys(keys, f"arm {name} of {path}", also=ARM_WORDS)
    return file, common, arms


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"study file not found: {path}{hint}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # yaml raises many types; each is a mistake in the file
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, it holds a list")
    return {str(key): value for key, value in content.items()}


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override {item!r} has no '='; write key=value, for example set.data.root=DIR")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=True)
    except Exception as error:  # a value that YAML cannot parse
        raise ConfigError(f"override not understood: {error}") from None
    return {str(key): value for key, value in content.items()}


def _arm_entry(entry: Any, key: str, where: str) -> dict[str, Any]:
    entry = dict(_mapping(entry, key, where))
    grid = _mapping(entry.pop("grid", None) or {}, f"{key}.grid", where)
    return flat(entry) | flat(grid, "grid.")


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


def _check(file: StudyFile, path: Path, arms: Mapping[str, Mapping[str, Any]]) -> None:
    name = "letters, digits and _.+- only"
    problems = [
        (not NAME.fullmatch(file.study), f"study={file.study!r}: name the study with {name}"),
        (not file.recipe, "recipe is missing; name the recipe of all arms, relative to the study file"),
        (not arms, "arms is empty; write at least one, e.g. arms: {sft: {rl.enabled: false}}"),
        (not file.seeds or min(file.seeds) < 0, f"seeds={list(file.seeds)} must hold whole numbers >= 0"),
        (bool(file.shared_from) and not NAME.fullmatch(file.shared_from), "shared_from must be the name of a study"),
        (file.launcher not in LAUNCHERS, f"launcher={file.launcher} must be one of {', '.join(LAUNCHERS)}"),
        (file.launcher == "local" and bool(file.sbatch), f"sbatch={list(file.sbatch)} needs launcher=slurm"),
        (file.workers < 0, f"workers={file.workers} must be >= 0 (0 = cores)"),
        *((not NAME.fullmatch(arm), f"arm {arm}: a name holds {name}") for arm in arms),
    ]
    for wrong, message in problems:
        if wrong:
            raise ConfigError(f"{path}: {message}")
    for metric in [*file.metrics, *(metric for sweep in file.sweeps for metric in sweep.metrics)]:
        check_metric(metric)


def _check_recipe_keys(keys: Iterable[str], where: str, also: Sequence[str] = ()) -> None:
    """Raises ConfigError for a key that no recipe has, or that the study sets itself."""
    valid = [key for key, _ in leaf_fields(Recipe)]
    for key in keys:
        if key in OWN_KEYS:
            raise ConfigError(f"{key} in {where} is set by the study; use seeds, run_root or the arm's name")
        if key not in valid and key.split(".")[0] not in FREE_FORM:
            require_known([key], [*valid, *also], where)


def require_known(names: Iterable[str], valid: Sequence[str], where: str) -> None:
    """Raises ConfigError for a name that is not valid; the message has the nearest valid one."""
    for name in names:
        if name not in valid:
            raise ConfigError(f"unknown key {name} in {where}; {nearest(name, valid)}")


def nearest(name: str, valid: Sequence[str]) -> str:
    """A hint for a name that is not valid: the most similar valid one, else the first valid ones."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid[:20])}"
