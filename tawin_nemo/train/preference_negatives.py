"""Where preference optimisation takes rejected items from: draws without a model, or searches of the policy itself.

Searches (``negatives=beam`` and ``self_play``, the latter SPRec's rounds, arXiv 2412.09243) run every
``preference.search_every`` steps for all rows of the steps up to the next search. Their result is kept on every process
and belongs to the checkpoint: the weights of the search are gone when a run resumes between two searches.

Axes beyond ``types``: R rows, N rejected items of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.config.schema import PreferenceConfig
from tawin_nemo.data.batches import BatchStream, balanced_shard
from tawin_nemo.data.negative_sampling import CandidateNegatives, RandomNegatives
from tawin_nemo.data.samples import Samples
from tawin_nemo.placement.weight_sync import sync_weights
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.rollout.groups import repeats_before
from tawin_nemo.run.world import World
from tawin_nemo.train.own_code import OwnNegatives, own_negatives
from tawin_nemo.types import NO_ITEM, DataParallel, PromptBatch, TokenRows  # noqa: F401 (TokenRows: doctest)
from tawin_nemo.util.errors import CheckpointError, ConfigError
from tawin_nemo.util.imports import is_import_path

#: Draws of the policy per rejected item that is kept (``distinct_first``).
OVERSAMPLE = 1.5


class Negatives(Protocol):
    """A source of rejected items."""

    def prepare(self, step: int) -> bool:
        """Make the rejected items of ``step`` available; every process calls it. True if a search was run."""

    def items(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Rejected items of ``rows`` of train; NO_ITEM where there are fewer. [R, N] int64."""

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint before 0-based ``step`` must hold, as JSON."""

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Continue before ``step``. Raises CheckpointError when ``state`` lacks what that step needs."""


@dataclass(frozen=True)
class DrawnNegatives:
    """Pure functions of seed and step: nothing to prepare or to save."""

    source: RandomNegatives | CandidateNegatives | OwnNegatives

    def prepare(self, step: int) -> bool:
        return False

    def items(self, rows: np.ndarray, step: int) -> np.ndarray:
        return self.source.items(rows, step)

    def state(self, step: int) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any], step: int) -> None:
        pass


class SearchedNegatives:
    """The policy's own wrong items: the best of a beam search, or distinct draws (``self_play``).

    Only the target, and items written like it, are not rejected **[choice: items of the history may be]**.
    ``rows`` are the rows of train that ``stream`` numbers; the run has ``total`` steps.
    """

    def __init__(
        self, cfg: PreferenceConfig, samples: Samples, rows: np.ndarray, stream: BatchStream, engine: Engine,
        leaf_I: np.ndarray, dp: DataParallel, *, total: int,
    ) -> None:  # fmt: skip
        self._cfg, self._samples, self._rows, self._stream = cfg, samples, rows, stream
        self._engine, self._leaf_I, self._dp, self._total = engine, torch.from_numpy(leaf_I), dp, total
        self._every = cfg.search_every or max(1, -(-stream.n // stream.batch_size))
        self._searched_R, self._items_RN = np.zeros(0, np.int64), np.zeros((0, cfg.num_negatives), np.int64)

    def prepare(self, step: int) -> bool:
        """Search for the rows of the steps from ``step`` up to the next search, where one is due."""
        if step % self._every:
            return False
        upto = min(step + self._every, self._total)
        self._searched_R = np.unique(self._rows[np.concatenate([self._stream.batch(s) for s in range(step, upto)])])
        sync_weights(self._engine, version=step)
        replicas = self._engine.dp or self._dp
        places_R = np.arange(len(self._searched_R))
        mine = balanced_shard(places_R, self._samples.prompts.lengths_of(self._searched_R), replicas)
        parts = replicas.gather((mine, self._search(self._searched_R[mine], step)))
        order = np.concatenate([places for places, _ in parts]).argsort(kind="stable")
        self._items_RN = np.concatenate([items for _, items in parts])[order]
        return True

    def _search(self, rows: np.ndarray, step: int) -> np.ndarray:
        prompts, num = self._samples.prompt_batch(rows), self._cfg.num_negatives
        if num + 1 > len(self._leaf_I.unique()):
            raise ConfigError(
                f"preference.num_negatives={num} asks for more wrong items than the catalog has besides the target; "
                f"use at most {len(self._leaf_I.unique()) - 1}"
            )
        if self._cfg.negatives == "beam":
            found = self._engine.search(prompts.prompts, num + 1)
            return wrong_items(found.items_BW.cpu(), self._leaf_I, prompts, num)
        rollout = self._engine.generate(
            prompts, num + 1, negatives="dynamic", policy_space="trie", step=step, oversample=OVERSAMPLE
        )
        return wrong_items(rollout.items_BG.cpu(), self._leaf_I, prompts, num)

    def items(self, rows: np.ndarray, step: int) -> np.ndarray:
        return self._items_RN[np.searchsorted(self._searched_R, rows)]

    def state(self, step: int) -> dict[str, Any]:
        if step % self._every == 0:
            return {}
        return {"rows": self._searched_R.tolist(), "items": self._items_RN.tolist()}

    def restore(self, state: dict[str, Any], step: int) -> None:
        if step % self._every == 0:
            return
        if not state:
            raise CheckpointError(
                f"the checkpoint of step {step} holds no rejected items, but preference.search_every={self._every} "
                "searches at another step; resume from an older checkpoint"
            )
        self._searched_R = np.array(state["rows"], dtype=np.int64)
        self._items_RN = np.array(state["items"], dtype=np.int64).reshape(len(self._searched_R), -1)


def wrong_items(items_BW: Tensor, leaf_I: Tensor, prompts: PromptBatch, num: int) -> np.ndarray:
    """The first ``num`` different candidates of each list that are not the target or written like it. [B, num] int64.

    >>> prompts = PromptBatch(torch.arange(1), TokenRows.from_lists([[1]]), torch.tensor([2]))
    >>> wrong_items(torch.tensor([[4, 2, 4, 0, NO_ITEM]]), torch.arange(5), prompts, 3).tolist()
    [[4, 0, -1]]
    """
    hit_BW = leaf_I[items_BW.clamp(min=0)] == leaf_I[prompts.target_B].unsqueeze(1)
    kept_BW = (items_BW != NO_ITEM) & ~hit_BW & (repeats_before(items_BW) == 0)
    order_BW = (~kept_BW).int().argsort(dim=1, stable=True)
    sorted_BW = torch.where(kept_BW, items_BW, NO_ITEM).gather(1, order_BW)[:, :num]
    return np.asarray(torch.nn.functional.pad(sorted_BW, (0, num - sorted_BW.shape[1]), value=NO_ITEM).numpy())


def build_negatives(
    world: World, rows: np.ndarray, stream: BatchStream, engine: Engine, *, total: int
) -> Negatives:  # fmt: skip
    """The source that ``preference.negatives`` names, for ``rows`` of train.

    Raises ConfigError for an import path that leads nowhere.
    """
    cfg, samples, leaf_I, seed = (
        world.recipe.preference,
        world.samples["train"],
        world.catalog.leaf_I,
        world.recipe.seed,
    )
    if is_import_path(cfg.negatives):
        return DrawnNegatives(own_negatives(cfg, world))
    if cfg.negatives == "random":
        return DrawnNegatives(RandomNegatives(samples, leaf_I, cfg.num_negatives, seed))
    if cfg.negatives == "candidates":
        return DrawnNegatives(CandidateNegatives(samples, leaf_I, cfg.num_negatives, seed, cfg.num_candidates))
    return SearchedNegatives(cfg, samples, rows, stream, engine, leaf_I, world.dp, total=total)
