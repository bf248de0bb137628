"""Which rows a step of preference optimisation has, which of them share rejected items, and NAPO's margin.

Axes beyond ``types``: R rows of this replica, N rejected items of a row, K rows that a row reads (itself first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.baselines.auxiliary import Auxiliary, load_auxiliary
from tawin_nemo.config.schema import PreferenceConfig
from tawin_nemo.data.batches import BatchStream, balanced_shard
from tawin_nemo.data.samples import Samples
from tawin_nemo.maths.dynamic_margin import confidence, dynamic_margin, next_baseline
from tawin_nemo.maths.negative_sharing import NO_ROW, num_similar, similar_rows
from tawin_nemo.run.world import World
from tawin_nemo.train.preference_batch import PreferenceRows
from tawin_nemo.train.preference_negatives import Negatives
from tawin_nemo.types import NO_ITEM, DataParallel
from tawin_nemo.util.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class RowBuilder:
    """The rows of each step: ``stream`` numbers ``rows`` of train; ``aux`` is the auxiliary model, where one is used.

    A batch is cut into sharing groups in the order of the stream, and groups are dealt out to the replicas, so that
    neither depends on the layout.
    """

    cfg: PreferenceConfig
    samples: Samples
    rows: np.ndarray
    stream: BatchStream
    dp: DataParallel
    aux: Auxiliary | None

    @property
    def batch_size(self) -> int:
        """Rows of a step over all replicas."""
        return self.stream.batch_size

    def of_step(self, step: int, negatives: Negatives) -> PreferenceRows:
        """This replica's rows of ``step`` with their rejected items."""
        picked = self.rows[self.stream.batch(step)]
        group_B = np.arange(len(picked)) // self.cfg.group_rows
        groups, first_G = np.unique(group_B, return_index=True)
        lengths_G = np.add.reduceat(self.samples.prompts.lengths_of(picked), first_G)
        mine = np.isin(group_B, balanced_shard(groups, lengths_G, self.dp))
        row_R, group_R = picked[mine], group_B[mine]
        items_RN = negatives.items(row_R, step)
        return PreferenceRows(
            row_R, group_R, items_RN, self._sources(row_R, group_R), self._epsilons(row_R, group_R, items_RN)
        )

    def _sources(self, row_R: np.ndarray, group_R: np.ndarray) -> np.ndarray:
        """``source_RK``: each row itself, then those that share with it."""
        most = num_similar(self.cfg.group_rows, self.cfg.rho) if self.cfg.algorithm == "napo" else 0
        source_RK = np.full((len(row_R), most + 1), NO_ROW, dtype=np.int64)
        source_RK[:, 0] = np.arange(len(row_R))
        if most:
            for places, state_BD in self._states(row_R, group_R):
                similar = similar_rows(state_BD, num_similar(len(places), self.cfg.rho)).numpy()
                source_RK[places, : similar.shape[1]] = places[similar]
        return source_RK

    def _epsilons(self, row_R: np.ndarray, group_R: np.ndarray, items_RN: np.ndarray) -> np.ndarray:
        """RosePO's label noise **[choice]**: ``epsilon``, or with an auxiliary model ``epsilon`` times how far it
        prefers the rejected item, ``(1 + (cos- - cos+) / 2) / 2`` in [0, 1]."""
        cfg = self.cfg
        if cfg.algorithm != "rosepo":
            return np.zeros(items_RN.shape, dtype=np.float32)
        if self.aux is None:
            return np.full(items_RN.shape, cfg.epsilon, dtype=np.float32)
        both_RA = np.concatenate([self.samples.target_N[row_R][:, None], items_RN], axis=1)
        cosine_RA = self._cosines(row_R, group_R, both_RA).numpy()
        return np.asarray(cfg.epsilon * (1 + (cosine_RA[:, 1:] - cosine_RA[:, :1]) / 2) / 2, dtype=np.float32)

    def confidences(self, rows: PreferenceRows) -> np.ndarray:
        """How surely the auxiliary model rejects each of this replica's own rejected items; empty where the margin
        does not depend on it."""
        if not self.cfg.uses_margin_of_aux:
            return np.zeros(0)
        cosine_RN = self._cosines(rows.row_R, rows.group_R, rows.items_RN)
        return np.asarray(confidence(cosine_RN.double()).numpy()[rows.items_RN != NO_ITEM])

    def _cosines(self, row_R: np.ndarray, group_R: np.ndarray, items_RN: np.ndarray) -> Tensor:
        assert self.aux is not None
        cosine_RN = torch.zeros(items_RN.shape)
        for places, state_BD in self._states(row_R, group_R):
            cosine_RN[places] = self.aux.cosines(state_BD, torch.from_numpy(items_RN[places]))
        return cosine_RN

    def _states(self, row_R: np.ndarray, group_R: np.ndarray) -> list[tuple[np.ndarray, Tensor]]:
        """Places and states of each group: always the same rows together, whatever the layout."""
        assert self.aux is not None
        groups = [np.flatnonzero(group_R == group) for group in np.unique(group_R)]
        return [
            (places, self.aux.states([self.samples.history[int(row)] for row in row_R[places]])) for places in groups
        ]


def build_rows(world: World, rows: np.ndarray, stream: BatchStream) -> RowBuilder:
    """The rows of section ``preference``. Raises ConfigError for an unusable ``preference.aux``."""
    cfg = world.recipe.preference
    aux = load_auxiliary(cfg.aux, world.catalog.external_ids) if cfg.aux else None
    return RowBuilder(cfg, world.samples["train"], rows, stream, world.dp, aux)


class BatchMargin:
    """NAPO's margin of each batch, and the running mean of the confidence that belongs to a checkpoint."""

    def __init__(self, cfg: PreferenceConfig, dp: DataParallel) -> None:
        self._cfg, self._dp = cfg, dp
        self.baseline: float | None = None

    def of_batch(self, confidences: np.ndarray) -> tuple[float, dict[str, float]]:
        """The margin of the batch whose confidences on this replica these are, and what to log; moves the mean on."""
        cfg = self._cfg
        if not cfg.uses_margin_of_aux:
            return cfg.gamma0, {}
        total, count = np.sum(self._dp.gather((float(confidences.sum()), len(confidences))), axis=0)
        mean = float(total) / max(1.0, float(count))
        before = mean if self.baseline is None else self.baseline
        gamma = dynamic_margin(mean, before, gamma0=cfg.gamma0, alpha=cfg.alpha)
        self.baseline = next_baseline(self.baseline, mean, momentum=cfg.momentum)
        return gamma, {"gamma": gamma, "confidence": mean, "confidence_baseline": self.baseline}

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {} if self.baseline is None else {"confidence_baseline": self.baseline}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Continue after ``step`` steps. Raises CheckpointError when the running mean is missing."""
        if not self._cfg.uses_margin_of_aux:
            return
        if "confidence_baseline" not in state:
            raise CheckpointError(
                f"the checkpoint of step {step} holds no running confidence, which preference.margin=dynamic needs; "
                "it is of another recipe: remove the stage's checkpoints, or set preference.margin=fixed"
            )
        self.baseline = float(state["confidence_baseline"])
