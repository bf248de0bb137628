"""More steps for a run that has ended: a finished stage is opened again and continues with its optimizer.

Under a raised ``rl.epochs``, ``rl.max_steps``, ``sft.epochs``, ``preference.epochs`` or ``preference.max_steps`` the
same command continues from the stage's last checkpoint, moments and all. Under a constant learning rate the result is
bit for bit that of a run which was that long from the start; decaying schedules are those of the new length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tawin_nemo.config.load import differences, read_recipe, to_yaml
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.world import LENGTH_KEYS, World
from tawin_nemo.train.plan import Plan, plans, preference_steps, total_steps
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.files import atomic_path
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Extension:
    """A finished stage that the recipe now asks to be longer."""

    stage: str
    kind: str  # of its plan
    done_steps: int
    keys: str  # what changed, as ``key: old -> new``


def extensions(world: World) -> list[Extension]:
    """The finished stages of this run that the recipe makes longer; empty where no length has changed.

    Raises ConfigError for a length below what a finished stage has run, and when another stage of the run has started
    from the stage: its weights would be those of a policy that no longer exists.
    """
    stored = world.run_dir / "recipe.yaml"
    if not stored.is_file():
        return []
    text = stored.read_text(encoding="utf-8")
    changed = [line for line in differences(text, to_yaml(world.recipe)) if line.split(":")[0] in LENGTH_KEYS]
    if not changed:
        return []
    before = read_recipe(stored)
    planned = list(plans(world))
    found = []
    for plan in planned:
        keys = "; ".join(line for line in changed if line.startswith(f"{plan.kind}."))
        folder = world.run_dir / plan.name
        if not keys or not (folder / "done.json").is_file():
            continue
        old, new = length(before, plan), length(world.recipe, plan)
        done_steps = int(json.loads((folder / "done.json").read_text(encoding="utf-8"))["step"])
        if new < old:
            raise ConfigError(
                f"{keys}: stage {plan.name} of {world.run_dir} has finished {done_steps} steps and cannot become "
                "shorter; choose another name= or run_dir="
            )
        if new > old and not stopped_early(folder, world.recipe):
            found.append(Extension(plan.name, plan.kind, done_steps, keys))
    for extension in found:
        _check_followers(world, extension, planned)
    return found


def _check_followers(world: World, extension: Extension, planned: list[Plan]) -> None:
    name = extension.stage
    followers = [plan.name for plan in planned if plan.start == name and (world.run_dir / plan.name).is_dir()]
    if followers:
        raise ConfigError(
            f"{extension.keys} would continue stage {name}, but {' and '.join(followers)} of {world.run_dir} started "
            f"from it; remove {', '.join(str(world.run_dir / other) for other in followers)}, or start a new run from "
            f"it: name=NEW sft.enabled=false start={world.run_dir / name}"
        )


def length(recipe: Recipe, plan: Plan) -> float:
    """How long the recipe makes a stage: steps of RL and of preference optimisation, epochs of SFT."""
    if plan.kind == "rl":
        return total_steps(recipe.rl, len(plan.rows))
    return preference_steps(recipe.preference, len(plan.rows)) if plan.kind == "preference" else recipe.sft.epochs


def stopped_early(stage: Path, recipe: Recipe) -> bool:
    """Whether SFT ended because valid had stopped improving: more epochs would change nothing."""
    steps = sorted((int(path.name.removeprefix("step_")), path) for path in (stage / "checkpoints").glob("step_*"))
    if not steps or not (steps[-1][1] / "state.json").is_file():
        return False
    progress = json.loads((steps[-1][1] / "state.json").read_text(encoding="utf-8")).get("progress", {})
    return int(progress.get("bad_checks", 0)) >= recipe.sft.patience


def extend_finished(world: World) -> None:
    """Open the stages of ``extensions`` again, and store the recipe with the new lengths in the run directory.

    Their evaluation moves to ``eval.step_N`` beside the new one. Interrupted anywhere, the same call completes it:
    the stored recipe changes last. Raises ConfigError as ``extensions`` does.
    """
    found = runtime.on_rank_0(lambda: extensions(world))
    for extension in found:
        log.info("%s continues after step %d: %s", extension.stage, extension.done_steps, extension.keys)
        schedule = {"rl": world.recipe.rl.schedule, "preference": world.recipe.preference.schedule}
        if schedule.get(extension.kind, world.recipe.sft.schedule) != "constant":
            log.warning(
                "%s: the learning rate of the new steps follows the schedule of the new length, so this run differs "
                "from one that was that long from the start", extension.stage,
            )  # fmt: skip
    runtime.on_rank_0(lambda: _reopen(world, found))


def _reopen(world: World, found: list[Extension]) -> None:
    for extension in found:
        stage = world.run_dir / extension.stage
        if (stage / "eval").is_dir():
            (stage / "eval").rename(_unused(stage / f"eval.step_{extension.done_steps}"))
        (stage / "done.json").unlink()
    stored, resolved = world.run_dir / "recipe.yaml", to_yaml(world.recipe)
    lengths_changed = differences(stored.read_text(encoding="utf-8"), resolved) if stored.is_file() else []
    if any(line.split(":")[0] in LENGTH_KEYS for line in lengths_changed):
        with atomic_path(stored) as temporary:
            temporary.write_text(resolved, encoding="utf-8")


def _unused(path: Path) -> Path:
    """``path``, with a number behind it where an earlier evaluation has that name."""
    number = 1
    chosen = path
    while chosen.exists():
        number += 1
        chosen = path.with_name(f"{path.name}.{number}")
    return chosen
