"""A stage whose weights are an ordinary torch module: the same files as ``Stage``, other checkpoints."""

from __future__ import annotations

from typing import Any

from tawin_nemo.baselines.load import find_problem, load_checkpoint, save_checkpoint
from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.run.stage import Progress, Stage
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


class BaselineStage(Stage):
    """``resume`` and ``save`` take a ``Fitting`` in place of a Trainable; one process."""

    def resume(self, trainable: Any) -> Progress:
        """Load the newest checkpoint that is whole; a fresh stage starts at step 0."""
        newest = checkpoint.newest_valid(self.checkpoints, find_problem)
        if newest is None:
            self._rewind(-1)
            return Progress()
        progress = Progress(**load_checkpoint(newest, trainable.model, trainable.optimizer)["progress"])
        checkpoint.set_aside(self.checkpoints, progress.step)
        self._rewind(progress.step)
        log.info("%s continues after step %d", self.name, progress.step)
        return progress

    def save(self, trainable: Any, progress: Progress) -> None:
        """Write ``checkpoints/step_N`` and remove what ``keep_last`` and the best step do not protect.

        The best checkpoint always stays: it is what the stage hands on.
        """
        self._flush()
        state = {"progress": vars(progress), "stage": self.name}
        save_checkpoint(self.checkpoints / f"step_{progress.step}", trainable, state)
        self._saved_step = progress.step
        checkpoint.prune(self.checkpoints, keep_last=self.trainer.keep_last, keep={progress.best_step})
