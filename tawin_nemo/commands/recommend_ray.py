"""The parts of the verb recommend in actors of Ray Data (extra ``ray``), on one machine or a Ray cluster.

Ray distributes numbers of parts; an actor has a model of its own and writes its parts as any other process does, so
their bytes, checksums and the way a stopped job goes on are the same. All machines see the same files under the same
paths.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tawin_nemo.commands.recommend_job import allowed_items, histories_of
from tawin_nemo.config.schema import Recipe
from tawin_nemo.run.parts import Parts
from tawin_nemo.util.cuda_defaults import set_cuda_defaults
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.log import progress


class PartMaker:
    """An actor: opens the model of ``recipe`` once, then makes one part after the other."""

    def __init__(self, recipe: Recipe, parts: Parts, folder: str) -> None:
        """``folder``: the working directory that paths of the recipe begin at. Raises as ``Recommender``."""
        from tawin_nemo.commands.recommend import Writer
        from tawin_nemo.commands.session import started, trained_world
        from tawin_nemo.run.exported import from_export
        from tawin_nemo.train.start import engine_of

        os.chdir(folder)
        set_cuda_defaults()
        self._stack = contextlib.ExitStack()
        recipe = from_export(recipe)
        self._stack.enter_context(started(recipe))
        world = trained_world(recipe, weights_follow=False)
        self._writer = Writer(
            world, engine_of(world), histories_of(world), parts, allowed_items(world), writes=True
        )  # fmt: skip

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make the parts of a batch; returns how many rows each has."""
        rows = [sum(self._writer.steps([part])) for part in batch["part"].tolist()]
        return {"part": batch["part"], "rows": np.array(rows, dtype=np.int64)}


def check_ray() -> Any:
    """The package ``ray``. Raises ConfigError where it is not installed."""
    try:
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"recommend.ray_actors needs Ray Data, which cannot be imported ({error}): pip install 'tawin-nemo[ray]', "
            "or use trainer.devices and arrays (recommend.ray_actors=0)"
        ) from error
    return ray


def made_parts(recipe: Recipe, parts: Parts, todo: Sequence[int]) -> Iterator[int]:
    """Make the parts ``todo`` in ``recommend.ray_actors`` actors; yields the rows of each part that is written."""
    ray = check_ray()
    mine = not ray.is_initialized()
    if mine:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        gpus = 1 if torch.cuda.is_available() else 0
        made = ray.data.from_items([{"part": part} for part in todo]).map_batches(
            PartMaker, fn_constructor_args=(recipe, parts, os.getcwd()), batch_size=1,
            concurrency=min(recipe.recommend.ray_actors, len(todo)), num_cpus=max(1, recipe.trainer.threads),
            num_gpus=gpus,
        )  # fmt: skip
        for row in made.iter_rows():
            yield int(row["rows"])
    finally:
        if mine:
            ray.shutdown()


def compute_with_ray(
    recipe: Recipe, parts: Parts, todo: Sequence[int], stop_if_asked: Callable[[], None]
) -> dict[str, Any]:  # fmt: skip
    """Make the parts ``todo``; the figures of the job. ``stop_if_asked`` is called after every part."""
    rows = sum(end - begin for begin, end in map(parts.bounds, todo))
    begun = time.monotonic()
    steps = made_parts(recipe, parts, todo) if todo else iter(())
    for _ in progress(steps, what="recommend", total=rows, size=lambda done: done, unit="rows"):
        stop_if_asked()
    seconds = time.monotonic() - begun
    return {
        "parts_made": len(todo), "rows_made": rows, "seconds": round(seconds, 3),
        "rows_per_s": round(rows / seconds, 1) if rows else 0.0, "complete": parts.complete() is not None,
    }  # fmt: skip
