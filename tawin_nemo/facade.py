"""The Python interface, handed out by ``tawin_nemo.api``: what the command line does, as functions.

A function that works on a model opens a process group and closes it again; only one thing at a time is open in a
process, so a ``Recommender`` has to be closed (or used in a ``with`` block) before the next call.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tawin_nemo.config.load import load_recipe as read_recipe
from tawin_nemo.config.schema import Recipe
from tawin_nemo.config.seams import imported
from tawin_nemo.types import NO_ITEM, TokenRows
from tawin_nemo.util.cuda_defaults import set_cuda_defaults
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.imports import path_of
from tawin_nemo.util.launch import is_launched

if TYPE_CHECKING:
    from tawin_nemo.rollout.engine import Engine
    from tawin_nemo.run.world import World

#: A recipe, its file, or the file of one.
RecipeLike = Recipe | str | Path
_open: list[Recommender] = []


def load_recipe(path: str | Path | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """The checked recipe in a YAML file (None: all defaults) with ``overrides`` above it.

    Args:
        path: A recipe file; its ``base:`` is read too.
        overrides: Words as on the command line (``["rl.lr=1e-5"]``), or a dictionary by key. In a dictionary a
            function or class stands for its import path, so that ``{"rl.reward": my_reward}`` works for code that
            lies in a file.

    Raises:
        ConfigError: A missing file, unknown key, wrong type, value out of limits, impossible combination, or a
            function that no import path leads to.

    >>> load_recipe(None, {"rl.lr": 1e-5, "eval.ks": [1, 3]}).eval.ks
    [1, 3]
    """
    return read_recipe(path, _words(overrides))


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, list | tuple):
        return json.dumps([path_of(part) if callable(part) else part for part in value])
    return path_of(value) if callable(value) else json.dumps(value)


def train(recipe: RecipeLike, *, dry_run: bool = False) -> dict[str, Any]:
    """Run every stage of ``recipe`` that is not done: data, SFT, RL, evaluation, report. Continues a stopped run.

    With ``trainer.devices`` above 1 that many processes are started, as the command line does; inside processes that
    torchrun or srun has started, every one of them calls this function.

    Args:
        recipe: A recipe, or the file of one.
        dry_run: Prepare the data and check every stage, then return rows, steps and sizes.

    Returns:
        The summary that is also written to RUN_DIR/summary.json: the means of every stage on the last of
        ``eval.splits``, ``invalid_rate``, ``wall_s``, ``run_dir`` and ``final_stage``.

    Raises:
        ConfigError, DataError: What the user can correct, with the remedy.
        Preempted: A signal came, or ``trainer.max_time`` is over; the same call continues.
    """
    recipe = imported(_recipe(recipe), trains=True)
    from tawin_nemo.commands.session import run
    from tawin_nemo.commands.train import train as verb

    if recipe.trainer.devices > 1 and not is_launched():
        from tawin_nemo.run.processes import train_in_processes

        return train_in_processes(recipe, dry_run=dry_run)
    with _alone("train"):
        return run(recipe, verb, dry_run=dry_run)


def evaluate(recipe: RecipeLike) -> dict[str, Any]:
    """Recall@K, NDCG@K and ``eval.metrics`` of a trained model on ``eval.splits``.

    The model is ``checkpoint`` of the recipe; where that is empty the newest finished stage of its run, else what a run
    would start from (``start``, ``model.init``).

    Args:
        recipe: A recipe, the file of one, or a run directory.

    Returns:
        ``{"checkpoint": path, SPLIT: {"recall@1": ..., "intervals": {...}, "rows": n, "invalid_rate": 0.0}}``.

    Raises:
        ConfigError: No weights, or a recipe that differs from the run's in what its model depends on.
    """
    recipe = _single(imported(_recipe(recipe), trains=False))
    from tawin_nemo.commands.evaluate import evaluate as verb
    from tawin_nemo.commands.session import run

    with _alone("evaluate"):
        return run(recipe, verb)


def recommend(
    recipe: RecipeLike, histories: Sequence[Sequence[str | int]], *, n: int = 10, exclude_history: bool = False
) -> list[list[Recommendation]]:
    """The best ``n`` catalog items for each history; for many calls keep a ``Recommender`` open instead.

    Args:
        recipe: A recipe, the file of one, or a run directory; the model is chosen as in ``evaluate``.
        histories: Items, oldest first, by external id or by number.
        n: Items per history.
        exclude_history: Never recommend an item of the history.

    Raises:
        ConfigError: As ``evaluate``, and for names of items that the catalog does not have.
    """
    with Recommender(_recipe(recipe)) as recommender:
        return recommender.recommend(histories, n=n, exclude_history=exclude_history)


@dataclass(frozen=True)
class Recommendation:
    """One recommended item of the catalog."""

    item: int  # its number
    external_id: str
    title: str
    score: float  # sum of the log-probs of its tokens, of ``rollout.score_space``


class Recommender:
    """A trained model with its catalog, open until ``close`` or the end of a ``with`` block.

    Every answer is an item of the catalog. The model runs in this process, on its device.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Open the model of ``recipe``, chosen as in ``evaluate``. Raises ConfigError as ``evaluate``."""
        recipe = _single(imported(recipe, trains=False))
        from tawin_nemo.commands.session import started, trained_world
        from tawin_nemo.run.exported import from_export
        from tawin_nemo.train.start import engine_of

        recipe = from_export(recipe)

        _check_alone("a Recommender")
        set_cuda_defaults()
        with contextlib.ExitStack() as stack:
            stack.enter_context(started(recipe))
            self.world: World = trained_world(recipe, weights_follow=False)
            self.engine: Engine = engine_of(self.world)
            self._stack = stack.pop_all()
        _open.append(self)

    @classmethod
    def from_run(cls, folder: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Self:
        """The model of a run directory, of one of its stages (RUN_DIR/rl) or of a checkpoint (RUN_DIR/rl/.../step_N).

        Raises ConfigError for a folder that belongs to no run, or a run without a finished stage.
        """
        return cls(recipe_of(folder, overrides))

    @classmethod
    def from_export(cls, folder: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Self:
        """The model of a folder that ``tawin-nemo convert`` wrote, with the catalog and prompt format in it.

        Raises ConfigError for a folder without them, such as a model that was written by another program.
        """
        folder = Path(folder).expanduser()
        lacking = [name for name in ("tawin.json", "recipe.yaml", "config.json") if not (folder / name).is_file()]
        if lacking:
            raise ConfigError(
                f"{folder} has no {', '.join(lacking)}, so it is no export with a catalog; write one with tawin-nemo "
                "convert convert.output=DIR, or use Recommender.from_run(RUN_DIR)"
            )
        return cls(load_recipe(folder / "recipe.yaml", [*_words(overrides), f"checkpoint={folder}"]))

    def recommend(
        self, histories: Sequence[Sequence[str | int]], *, n: int = 10, exclude_history: bool = False
    ) -> list[list[Recommendation]]:
        """The best ``n`` items for each history (oldest first, by external id or number), best first.

        ``max(n, eval.beams)`` beams are searched. Raises ConfigError for unknown items, or after ``close``.
        """
        from tawin_nemo.commands.generate import items_of
        from tawin_nemo.rollout.assist import histories_for
        from tawin_nemo.rollout.filters import ItemFilter

        if self not in _open:
            raise ConfigError("this Recommender is closed; open another one")
        if n < 1:
            raise ConfigError(f"n={n}, but at least 1 item can be recommended")
        world, catalog = self.world, self.world.catalog
        rows = [items_of([str(item) for item in history], catalog.external_ids) for history in histories]
        shown = [row[-world.recipe.data.max_history :] for row in rows]
        width = min(max(n, world.recipe.eval.beams), catalog.trie.num_leaves)
        options: dict[str, Any] = {}
        if exclude_history:
            options["filters"] = [ItemFilter.without(catalog.trie, set(row)) for row in rows]
        options |= histories_for(self.engine, TokenRows.from_lists(shown))
        found = self.engine.search(world.prompts_of(shown), width, **options)
        return [
            [
                Recommendation(item, catalog.external_ids[item], catalog.titles[item], score)
                for item, score in zip(items[:n], scores[:n], strict=True)
                if item != NO_ITEM
            ]
            for items, scores in zip(found.items_BW.tolist(), found.scores_BW.tolist(), strict=True)
        ]

    def close(self) -> None:
        """Leave the process group; safe to call twice."""
        if self in _open:
            _open.remove(self)
            self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def recipe_of(folder: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """The recipe that a run directory was made with; ``checkpoint`` is set where ``folder`` lies inside of one.

    Raises ConfigError when neither ``folder`` nor a folder above it has a recipe.yaml.
    """
    folder = Path(folder).expanduser()
    run_dir = next((each for each in (folder, *folder.parents) if (each / "recipe.yaml").is_file()), None)
    if run_dir is None:
        raise ConfigError(f"{folder} is no run directory and lies in none: there is no recipe.yaml")
    place = [f"run_dir={run_dir}", *([f"checkpoint={folder}"] if folder != run_dir else [])]
    return load_recipe(run_dir / "recipe.yaml", [*place, *_words(overrides)])


def _words(overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={_text(value)}" for key, value in overrides.items()]
    return list(overrides)


def _recipe(given: RecipeLike) -> Recipe:
    if isinstance(given, Recipe):
        return given
    return recipe_of(given) if Path(given).expanduser().is_dir() else load_recipe(given)


def _single(recipe: Recipe) -> Recipe:
    """Raises ConfigError for a recipe of several processes, unless a launcher has started them."""
    if recipe.processes > 1 and not is_launched():
        raise ConfigError(
            f"the recipe asks for {recipe.processes} processes, but this function works in one; add the overrides "
            "trainer.devices=1 and trainer.num_nodes=1, or use the command line"
        )
    return recipe


def _check_alone(what: str) -> None:
    if _open:
        raise ConfigError(f"{what} cannot start while a Recommender is open in this process; close() it first")


@contextlib.contextmanager
def _alone(what: str) -> Iterator[None]:
    _check_alone(what)
    set_cuda_defaults()
    yield
