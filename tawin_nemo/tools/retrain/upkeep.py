"""``tawin-nemo retrain list | rollback | prune``: the published versions of a folder; no training, no process group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import Recipe
from tawin_nemo.run.published import GATE_FILE, VERSION_FILE, check_version
from tawin_nemo.tools.retrain.publish_root import PublishRoot
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.log import say

ACTIONS = ("list", "rollback", "prune")


def run_upkeep(recipe_file: Path | str | None, words: Sequence[str]) -> dict[str, Any]:
    """Carry out the action ``words[0]`` with the overrides behind it; returns the result for the last line on stdout.

    Raises ConfigError for an unknown action, without ``retrain.root`` and for versions that are not there,
    CheckpointError for a broken version to go back to, Locked while another process publishes.
    """
    action, *overrides = words
    if action not in ACTIONS:
        raise ConfigError(f"retrain {action}: no such action; use one of {', '.join(ACTIONS)}, or none for a night")
    recipe = load_recipe(recipe_file, overrides)
    if not recipe.retrain.root or not Path(recipe.retrain.root).is_dir():
        raise ConfigError(f"retrain.root={recipe.retrain.root} is no folder; name that of the published versions")
    root = PublishRoot(Path(recipe.retrain.root))
    if action == "list":
        return listed(root)
    with root.changing(f"retrain {action}"):
        return rollback(root, recipe) if action == "rollback" else prune(root, keep=recipe.retrain.keep)


def listed(root: PublishRoot) -> dict[str, Any]:
    """All versions, oldest first, and the nightly runs whose model was refused."""
    live, taken_back = root.published(), root.rolled_back()
    versions = []
    for day in root.dates():
        gate = _gate_of(root.version(day))
        metrics = {verdict["metric"]: verdict["candidate"]["mean"] for verdict in gate.get("verdicts", [])}
        versions.append({
            "date": day, "live": live is not None and live.name == day, "before": root.before(day),
            "rolled_back": day in taken_back, "metrics": metrics, "data": gate.get("data", {}),
        })  # fmt: skip
    refused = []
    for folder in sorted((root.folder / "runs").glob("[!.]*")):
        gate = _gate_of(folder)
        if gate and not gate["passed"]:
            refused.append({"date": folder.name, "reasons": gate["reasons"]})
    for version in versions:
        mark = "live" if version["live"] else "rolled back" if version["rolled_back"] else ""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in version["metrics"].items())
        say(f"{version['date']}  {mark:11}  before: {version['before'] or 'none':10}  {figures}")
    for run in refused:
        say(f"{run['date']}  refused      {'; '.join(run['reasons'])}")
    return {"live": live.name if live else "", "versions": versions, "refused": refused}


def rollback(root: PublishRoot, recipe: Recipe) -> dict[str, Any]:
    """Make the version before the live one live again, or that of ``retrain.date``.

    The version that is left counts as taken back. A nightly run of its date is not published again; a later date is
    trained from the version that is then live.
    """
    live = root.published()
    if live is None:
        raise ConfigError(f"{root.latest} does not exist: nothing is published, so there is nothing to go back from")
    day = recipe.retrain.date or root.before(live.name)
    there = ", ".join(root.dates())
    if not day:
        raise ConfigError(f"there is no version before {live.name}; versions: {there} (retrain.date=DATE names one)")
    if day not in root.dates():
        raise ConfigError(f"retrain.date={day}: there is no such version; versions: {there}")
    if day == live.name:
        return {"rolled_back": "", "latest": str(live)}
    if (root.version(day) / VERSION_FILE).is_file():
        check_version(root.version(day))
    if day < live.name:  # first: a rollback that is killed in between is done by the same command
        root.note_rolled_back(root.rolled_back() | {live.name})
    root.point(day)
    say(f"{root.latest} points at {day}; it pointed at {live.name}")
    return {"rolled_back": live.name, "latest": str(root.version(day))}


def prune(root: PublishRoot, *, keep: int) -> dict[str, Any]:
    """Remove all but the ``keep`` newest versions, with their nightly runs, and older nightly runs without a version.

    Never removed: the live version, the one before it, what an unfinished nightly run started from, and nightly runs
    that are newer than the live version.
    """
    root.remove_leftovers()
    live, dates = root.published(), root.dates()
    if live is None:
        return {"removed": [], "kept": dates}
    begun = [path.name for path in (root.folder / "runs").glob("[!.]*")]
    newer = [run for day in begun if day > live.name and (run := root.recorded_run(day)) is not None]
    kept = {*dates[-keep:], live.name, root.before(live.name), *(Path(run.start).name for run in newer)}
    removed = sorted({day for day in [*dates, *begun] if day not in kept and day < live.name})
    for day in removed:
        root.remove(day)
    say(f"removed {', '.join(removed) or 'nothing'}")
    return {"removed": removed, "kept": root.dates()}


def _gate_of(folder: Path) -> dict[str, Any]:
    path = folder / GATE_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
