"""Metrics of one relevant item against the general definition of DCG."""

from __future__ import annotations

import math

import pytest
import torch

from tawin_nemo.maths.ranking import ndcg_at_k, recall_at_k


def listed(rank: int, length: int = 20) -> list[int]:
    """Relevance of each place of a list with one relevant item."""
    return [int(place == rank) for place in range(length)]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_metrics_equal_the_definition(k: int) -> None:
    ranks = [-1, *range(20)]
    recall_B, ndcg_B = recall_at_k(torch.tensor(ranks), k), ndcg_at_k(torch.tensor(ranks), k)
    for rank, recall, ndcg in zip(ranks, recall_B.tolist(), ndcg_B.tolist(), strict=True):
        relevance = listed(rank)[:k]
        assert recall == sum(relevance)
        assert ndcg == pytest.approx(sum(rel / math.log2(place + 2) for place, rel in enumerate(relevance)))


def test_a_cutoff_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="k = 0"):
        recall_at_k(torch.tensor([0]), 0)
