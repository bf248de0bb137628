"""A finished sequential recommender as the auxiliary model of preference optimisation (NAPO, Eq. 13-15)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tawin_nemo.baselines.load import load_baseline, stored_blueprint
from tawin_nemo.baselines.protocol import EmbeddingRecommender, left_padded
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """States of users, and how well items fit them; reads the newest ``max_history`` items of a history."""

    model: EmbeddingRecommender
    max_history: int

    @torch.no_grad()
    def states(self, histories: Sequence[np.ndarray]) -> Tensor:
        """State of each history (item indices, oldest first, at least one). [B, D] float32 on the CPU."""
        rows = TokenRows.from_lists([np.asarray(history)[-self.max_history :] for history in histories])
        return self.model.state(left_padded(rows)).float()

    @torch.no_grad()
    def cosines(self, state_BD: Tensor, items_BN: Tensor) -> Tensor:
        """Cosine of each state and the vectors of its items, in [-1, 1]. [B, N]; arbitrary at NO_ITEM."""
        table_ID = self.model.items.weight[1:] if self.model.output is None else self.model.output.weight
        vectors_BND = normalize(table_ID[items_BN.clamp(min=0)].float(), dim=-1)
        return torch.einsum("bd,bnd->bn", normalize(state_BD, dim=-1), vectors_BND).clamp(-1.0, 1.0)


def load_auxiliary(stage: str, external_ids: Sequence[str]) -> Auxiliary:
    """The finished baseline stage that ``preference.aux`` names, for the catalog with ``external_ids``.

    Raises ConfigError when it is no finished baseline, is of another catalog, or has no states (tiger).
    """
    try:
        model = load_baseline(stage, external_ids=external_ids)
    except ConfigError as error:
        raise ConfigError(f"preference.aux={stage}: {error}") from error
    if not isinstance(model, EmbeddingRecommender):
        raise ConfigError(
            f"preference.aux={stage} has no states of users and vectors of items; "
            "name a gru4rec, caser, sasrec, hstu or esasrec stage"
        )
    return Auxiliary(model, stored_blueprint(Path(stage)).max_history)
