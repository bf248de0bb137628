"""Evaluations of training: ranking metrics on a split, and the exact match of alignment tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import EvalConfig
from tawin_nemo.data.tasks import CODES, DESCRIPTION, TITLE, TaskRows, active_tasks
from tawin_nemo.eval.bias import sequence_counts
from tawin_nemo.eval.evaluate import evaluate
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.world import World
from tawin_nemo.train.sft_data import TaskSet, task_sets, wording_of
from tawin_nemo.types import TokenRows
from tawin_nemo.util.files import write_json
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: Beam width of the search for an answer.
BEAMS = 10


def evaluate_split(
    world: World, engine: Engine, split: str, *, label: str, cfg: EvalConfig | None = None, popularity: bool = False
) -> EvalResult:
    """Recall@K and NDCG@K with the engine's present weights on a split of the run's dataset, equal on all ranks.

    ``cfg``: section ``eval`` unless given; ``popularity``: add the popularity bias. Raises DataError and ConfigError as
    ``evaluate`` does.
    """
    popularity_I = sequence_counts(world.samples["train"], len(world.catalog)) if popularity else None
    return evaluate(
        engine, world.samples[split], world.catalog, cfg or world.recipe.eval,
        dp=world.dp, label=label, popularity_I=popularity_I,
    )  # fmt: skip


def evaluate_tasks(
    world: World, directory: Path, rows: np.ndarray, build: Callable[[Catalog], Engine]
) -> dict[str, Any]:
    """Exact match of each active task, written to ``eval/tasks.json``: {task: {held_out | trained: {rows, exact}}}.

    Answers are searched among the codes or the titles of all items with ``BEAMS`` beams; the best one must be that of
    the item. Where several items have the same answer a hit counts 1 / their number. Tasks that ask for descriptions
    are skipped. ``build`` builds an engine for a catalog with the weights of the stage; ``rows`` are the rows of train
    that the stage uses.
    """
    if not active_tasks(world.recipe.align):
        return {}
    sets = [part for part in task_sets(world, rows) if part.task.wanted != DESCRIPTION]
    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind in dict.fromkeys(part.task.wanted for part in sets):  # one engine at a time, to save memory
        catalog = _answer_catalog(world, kind)
        engine = build(catalog)
        engine.receive_weights()
        results |= {part.task.name: _exact(world, engine, catalog, part) for part in sets if part.task.wanted == kind}
    for name, result in results.items():
        shown = ", ".join(f"{which} {value['exact']:.3f} of {value['rows']}" for which, value in result.items())
        log.info("task %s: exact match %s", name, shown)
    if runtime.world_rank() == 0:
        write_json(task_file(directory), results)
    runtime.barrier()
    return results


def task_file(directory: Path) -> Path:
    """The file with the task evaluation of a stage directory."""
    return directory / "eval" / "tasks.json"


def _exact(world: World, engine: Engine, catalog: Catalog, part: TaskSet) -> dict[str, dict[str, float]]:
    tested = min(world.recipe.align.tested_rows, len(part.train))
    index = np.unique(np.linspace(0, len(part.train) - 1, tested).astype(np.int64))
    chosen: dict[str, TaskRows] = {"held_out": part.held_out, "trained": part.train.take(index)}
    cfg = replace(world.recipe.eval, ks=[1], beams=BEAMS)
    shares: dict[str, dict[str, float]] = {}
    for which, rows in chosen.items():
        label = f"task {part.task.name} {which}"
        result = evaluate(engine, rows.samples, catalog, cfg, dp=world.dp, label=label)
        shares[which] = {"rows": len(rows), "exact": result.means["recall@1"]}
    return shares


def _answer_catalog(world: World, kind: str) -> Catalog:
    """The catalog whose token paths are the answers of a kind of task: codes or titles."""
    if kind == CODES:
        return world.catalog
    assert kind == TITLE
    items = world.dataset.items
    paths: TokenRows = wording_of(world).paths(TITLE)
    return Catalog(items.titles, items.external_ids, "title", paths, TokenTrie.from_paths(paths, names=items.titles))
