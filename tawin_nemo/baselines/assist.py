"""A finished recommender that joins the searches of a language model (``rollout.assist``, D3: arXiv 2406.14900)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.baselines.load import Scorer, load_scorer
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import AssistConfig
from tawin_nemo.rollout.assist import Assist
from tawin_nemo.types import TokenRows


@dataclass(frozen=True, eq=False)
class AuxiliaryRecommender:
    """Scores of every item of its catalog for a history, and its share in a search.

    ``weight``: the language model's share a; the recommender's is 1 - a.
    """

    scorer: Scorer
    external_ids: Sequence[str]  # of its items
    weight: float

    @cached_property
    def item_of(self) -> dict[str, int]:
        """External id -> its item; the first of several items of one id."""
        last = len(self.external_ids) - 1
        return {name: last - back for back, name in enumerate(reversed(self.external_ids))}

    def items_of(self, external_ids: Sequence[str]) -> np.ndarray:
        """Its item for each external id, -1 where it knows none. int64."""
        return np.fromiter((self.item_of.get(name, -1) for name in external_ids), np.int64, len(external_ids))

    def assist(self, trie: TokenTrie, histories: Sequence[np.ndarray], item_J: np.ndarray | None = None) -> Assist:
        """Its part in the search of B users over ``trie``; ``item_J``: its item for each of the trie's, or all alike.

        Histories hold its own items, oldest first. A user without any is searched without assistance. An item that it
        does not know (-1) scores as the median of those that it knows: it is neither preferred nor held back. Raises
        TawinError for scores that are not numbers.
        """
        known = np.array([row for row, history in enumerate(histories) if len(history)], dtype=np.int64)
        if not len(known):
            return Assist.none(len(histories), trie)
        scores_BI = self.scorer.scores([histories[row] for row in known.tolist()])
        mixed = Assist.of(trie, scores_BI if item_J is None else of_items(scores_BI, item_J), self.weight)
        if len(known) == len(histories):
            return mixed
        whole = Assist.none(len(histories), trie)
        whole.weight_P[known], whole.edge_PV[known] = mixed.weight_P, mixed.edge_PV
        return whole


def of_items(scores_BI: Tensor, item_J: np.ndarray) -> Tensor:
    """Scores [B, J] of items ``item_J``; where that is -1, the median of the row.

    >>> of_items(torch.tensor([[1.0, 2.0, 9.0]]), np.array([2, -1, 0])).tolist()
    [[9.0, 2.0, 1.0]]
    """
    item_J1 = torch.from_numpy(item_J)
    return torch.where(item_J1 < 0, scores_BI.median(dim=1, keepdim=True).values, scores_BI[:, item_J1.clamp(min=0)])


@dataclass(frozen=True, eq=False)
class CatalogAssistant:
    """``rollout.assist.Assistant`` for the catalog that the recommender was trained on."""

    recommender: AuxiliaryRecommender
    trie: TokenTrie

    def __call__(self, histories: TokenRows) -> Assist:
        """The assistance for B histories of item indices, oldest first."""
        return self.recommender.assist(self.trie, [histories[row] for row in range(len(histories))])


def load_auxiliary_recommender(cfg: AssistConfig, external_ids: Sequence[str]) -> AuxiliaryRecommender | None:
    """The recommender of section ``rollout.assist``, for the catalog with ``external_ids``; None without assistance.

    That is without a stage, and with the weight 1: the stage must be there, but it has no part in the search. Raises
    ConfigError that names the key when the stage is no finished baseline, is of another catalog, or is tiger.
    """
    if not cfg.stage:
        return None
    scorer = load_scorer(Path(cfg.stage), external_ids, key="rollout.assist.stage")
    return None if cfg.weight == 1.0 else AuxiliaryRecommender(scorer, list(external_ids), cfg.weight)
