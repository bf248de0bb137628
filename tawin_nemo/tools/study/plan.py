"""The runs of a study: what each one is, what exists already, what still has to run and about how long that takes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tawin_nemo.config.load import leaf_fields, load_recipe, value_of
from tawin_nemo.config.schema import Recipe
from tawin_nemo.tools.study.arms import Arm, Study, file_slug
from tawin_nemo.tools.study.record import FAILED, FailedRun, ParentRun, RunRecord, final_stage, read_folder
from tawin_nemo.util.errors import ConfigError

#: Keys that say where and how a run is made, not what it is. ``start`` is replaced by the parent's name.
MACHINE_KEYS = (
    "name", "run_dir", "data.root", "start", "checkpoint", "profile", "exp_manager", "eval.splits", "eval.token_budget",
    "trainer.max_time", "trainer.threads", "trainer.keep_last", "trainer.peak_tflops",
)  # fmt: skip
MACHINE_SECTIONS = ("generate", "convert", "sinks")
#: YAML's style whose escapes hold any character.
QUOTED = '"'
#: State of a run; AGAIN = finished, but its weights are gone and a child needs them.
DONE, TO_RUN, AGAIN = "done", "to run", "again for its weights"
#: Arm's name and seed.
Key = tuple[str, int]


@dataclass(frozen=True)
class Run:
    """One arm under one seed."""

    study: str
    arm: Arm
    seed: int
    recipe: Recipe  # of the arm; seed, name, run_dir and start are set when the run is launched
    settings: Mapping[str, Any]
    run_dir: Path
    file: Path
    parent_dir: Path | None  # run directory of the run whose weights it starts from

    @property
    def name(self) -> str:
        return f"{self.arm.name}.seed{self.seed}"

    @property
    def key(self) -> Key:
        return self.arm.name, self.seed

    @property
    def parent_key(self) -> Key | None:
        """The run of the same study that has to be finished before this one."""
        parent = self.arm.parent
        return (parent.arm, self.seed) if parent and not parent.study else None

    @property
    def parent_name(self) -> str:
        """``STUDY/ARM.seedN`` of the run that this one starts from; empty without one."""
        parent = self.arm.parent
        return f"{parent.study or self.study}/{parent.arm}.seed{self.seed}" if parent else ""

    @property
    def failed_file(self) -> Path:
        return self.file.with_name(self.file.name.removesuffix(".json") + FAILED)


@dataclass(frozen=True)
class Plan:
    """All runs, parents first, seed by seed, so that complete comparisons exist early."""

    study: Study
    runs: tuple[Run, ...]
    state: Mapping[Key, str]
    records: Mapping[Key, RunRecord]
    failed: Mapping[Key, FailedRun]

    @property
    def waiting(self) -> list[Run]:
        return [run for run in self.runs if self.state[run.key] != DONE]

    def seconds(self, run: Run) -> float | None:
        """What the run will take: as other seeds of the arm did, else other points of its grid, else all runs."""
        return expected_seconds(run, self.records)


def expected_seconds(run: Run, records: Mapping[Key, RunRecord]) -> float | None:
    groups: list[list[float]] = [[], [], []]
    for (arm, _), record in records.items():
        nearness = 0 if arm == run.arm.name else 1 if arm.split("[")[0] == run.arm.base else 2
        groups[nearness].append(max(record.wall_s, record.process_s))
    return next((fmean(group) for group in groups if group), None)


def make_plan(study: Study) -> Plan:
    """Read the recipe of every run and compare it with the run files.

    Raises ConfigError for a recipe that cannot be used, for a run file that was made with another recipe, and for a
    run of another study that is needed and not there.
    """
    recipes = {arm.name: arm_recipe(study, arm) for arm in study.arms}
    seeds = dict.fromkeys(seed for arm in study.arms for seed in arm.seeds)
    runs = tuple(_run(study, arm, seed, recipes[arm.name]) for seed in seeds for arm in study.arms if seed in arm.seeds)
    records, failed = read_folder(study.results)
    changed = [text for run in runs if run.key in records for text in _changes(run, records[run.key], records)]
    if changed:
        raise ConfigError("; ".join(changed[:3]) + "; rename the arm, or delete the file to run it again")
    state: dict[Key, str] = {}
    for run in reversed(runs):  # children first: what they need decides about their parents
        children = [child for child in runs if child.parent_key == run.key and state[child.key] != DONE]
        record = records.get(run.key)
        if record is None or not set(run.recipe.eval.splits) <= set(record.splits):
            state[run.key] = TO_RUN
        else:
            state[run.key] = AGAIN if children and final_stage(run.run_dir) is None else DONE
    plan = Plan(study, runs, state, records, failed)
    _require_other_studies(plan)
    return plan


def arm_recipe(study: Study, arm: Arm) -> Recipe:
    """The study's recipe with ``arm_keys`` over it. Raises ConfigError that names the arm."""
    keys = arm_keys(study, arm)
    if arm.parent:
        keys["start"] = "the final stage of another run"  # known when that run is finished
    try:
        return load_recipe(study.recipe, [as_override(key, value) for key, value in keys.items()])
    except ConfigError as error:
        raise ConfigError(f"arm {arm.name} of {study.path}: {error}") from None


def arm_keys(study: Study, arm: Arm) -> dict[str, Any]:
    """One thread per run and ``splits``, then ``set``, then the arm's own keys."""
    return {"trainer.threads": 1, "eval.splits": list(study.file.splits), **study.keys, **arm.keys}


def _run(study: Study, arm: Arm, seed: int, recipe: Recipe) -> Run:
    parent_dir = None
    if arm.parent:
        root = study.run_root.parent / arm.parent.study if arm.parent.study else study.run_root
        parent_dir = root / f"{file_slug(arm.parent.arm)}.seed{seed}"
    return Run(
        study.file.study, arm, seed, recipe, settings_of(replace(recipe, seed=seed)),
        study.run_root / f"{arm.slug}.seed{seed}", study.results / f"{arm.slug}.seed{seed}.json", parent_dir,
    )  # fmt: skip


def as_override(key: str, value: Any) -> str:
    """``key=value`` as the command line reads it back; strings are quoted only where they would be read otherwise.

    >>> as_override("eval.ks", [1, 3]), as_override("sft.rows", "fresh"), as_override("model.init", "1e3")
    ('eval.ks=[1, 3]', 'sft.rows=fresh', 'model.init="1e3"')
    """
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    try:
        bare = OmegaConf.from_dotlist([f"k={value}"])["k"] == value
    except (OmegaConfBaseException, yaml.YAMLError):
        bare = False
    return f"{key}={value if bare else yaml.safe_dump(value, default_style=QUOTED, width=math.inf).strip()}"


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Every key that decides about the result, by its dotted name."""
    keys = [key for key, _ in leaf_fields(Recipe) if key not in MACHINE_KEYS]
    return {key: value_of(recipe, key) for key in keys if key.split(".")[0] not in MACHINE_SECTIONS}


def recipe_hash(settings: Mapping[str, Any], parent: ParentRun | None) -> str:
    """SHA-256 over the settings that differ from their defaults and over the parent's hash.

    Keys that a later version adds do not change it as long as they keep their default.
    """
    defaults = settings_of(Recipe())
    changed = {key: value for key, value in settings.items() if defaults.get(key) != value}
    content = {"settings": changed, "parent": asdict(parent) if parent else None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parent_run(run: Run, records: Mapping[Key, RunRecord], results: Path) -> ParentRun | None:
    """The parent as a run file names it. Raises ConfigError when it has no run file."""
    parent = run.arm.parent
    if parent is None:
        return None
    if not parent.study:
        return ParentRun(run.parent_name, records[parent.arm, run.seed].recipe_hash)
    path = results.parent / parent.study / f"{file_slug(parent.arm)}.seed{run.seed}.json"
    if not path.is_file():
        raise ConfigError(f"{run.name} starts from {parent.study}/{parent.arm}, but there is no run file {path}")
    return ParentRun(run.parent_name, RunRecord.read(path).recipe_hash)


def _changes(run: Run, record: RunRecord, records: Mapping[Key, RunRecord]) -> list[str]:
    """What makes ``record`` a run of another recipe; a key that it does not know yet counts as its default."""
    stored = settings_of(Recipe()) | record.settings
    changes = [
        f"{key}: {stored.get(key)} -> {run.settings.get(key, 'no such key')}"
        for key in sorted({*record.settings, *run.settings})
        if stored.get(key) != run.settings.get(key)
    ]
    before = record.parent.run if record.parent else ""
    now = records.get(run.parent_key) if run.parent_key else None
    if run.parent_name != before:
        changes.append(f"after: {before or 'nothing'} -> {run.parent_name or 'nothing'}")
    elif now and record.parent and now.recipe_hash != record.parent.recipe_hash:
        changes.append(f"after: {run.parent_name} has another recipe than it had then")
    return [f"{run.file} was made with another recipe ({', '.join(changes[:5])})"] if changes else []


def _require_other_studies(plan: Plan) -> None:
    """Runs of other studies that waiting runs start from must be there, weights and all."""
    for run in plan.waiting:
        parent = run.arm.parent
        if parent and parent.study:
            parent_run(run, plan.records, plan.study.results)
            if run.parent_dir is None or final_stage(run.parent_dir) is None:
                raise ConfigError(
                    f"{run.name} starts from {parent.study}/{parent.arm}, but {run.parent_dir} holds no finished run; "
                    f"run `tawin-nemo study` with the file of {parent.study} first (its run files alone do not do)"
                )


def plan_table(plan: Plan, workers: int) -> str:
    """The runs in order with what exists and what each will take, for a person."""
    lines = []
    for number, run in enumerate(plan.runs, start=1):
        seconds = plan.seconds(run)
        minutes = "     ?" if seconds is None else f"{seconds / 60:6.1f}"
        state = plan.state[run.key]
        if state == TO_RUN and run.key in plan.failed:
            state = "to run, failed before"
        time = "      " if state == DONE else minutes
        after = f" after {run.arm.parent.arm}" if run.arm.parent else ""
        lines.append(f"{number:4} {run.name:48} {time} min  {state}{after}")
    total = total_seconds([plan.seconds(run) for run in plan.waiting], workers)
    about = "" if total is None else f", about {total / 60:.0f} min with {workers} at once"
    return "\n".join([*lines, f"{len(plan.waiting)} of {len(plan.runs)} runs to do{about}"])


def total_seconds(each: Sequence[float | None], workers: int) -> float | None:
    """Time for all with so many at once, unknown ones as long as the known on average; None when none is known."""
    known = [seconds for seconds in each if seconds is not None]
    if not each:
        return 0.0
    return fmean(known) * len(each) / workers if known else None
