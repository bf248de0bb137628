"""Code of one's own that is told what a run does, on every rank (``trainer.callbacks``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tawin_nemo.config.seams import made
from tawin_nemo.run.world import World

if TYPE_CHECKING:
    from tawin_nemo.run.stage import Stage


class Callback:
    """Base of callbacks (``trainer.callbacks``), made once per process with the ``World``, or with nothing.

    Every rank calls every method. A callback need not derive from this class; it needs at least one of the methods.
    What it raises ends the run.
    """

    def on_stage_start(self, stage: Stage, step: int) -> None:
        """Before the first step that this process takes; ``step`` steps were taken before."""

    def on_log(self, stage: Stage, step: int, metrics: dict[str, float]) -> None:
        """After a step or a validation, with the line of metrics.jsonl."""

    def on_save(self, stage: Stage, step: int) -> None:
        """After ``checkpoints/step_N`` was written, or, with ``trainer.async_save``, begun."""

    def on_stage_end(self, stage: Stage, step: int) -> None:
        """After the last step; the evaluation of the stage follows."""


class Callbacks:
    """Calls the methods that each of several callbacks has."""

    def __init__(self, callbacks: Sequence[Any] = ()) -> None:
        self._callbacks = tuple(callbacks)

    def call(self, event: str, *arguments: Any) -> None:
        """Call method ``event`` of every callback that has it, in the order of the recipe."""
        for callback in self._callbacks:
            if hasattr(callback, event):
                getattr(callback, event)(*arguments)


def build_callbacks(world: World) -> Callbacks:
    """The callbacks of ``trainer.callbacks``. Raises ConfigError as ``seams.made``."""
    key = "trainer.callbacks"
    return Callbacks([made(key, path, world) for path in world.recipe.trainer.callbacks])
