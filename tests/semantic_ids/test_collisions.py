"""Collisions: all told apart, at the least cost, and never by dropping an item."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from tawin_nemo.semantic_ids.clustering import transport_plan
from tawin_nemo.semantic_ids.codebooks import Codebooks
from tawin_nemo.semantic_ids.collisions import (
    NO_TOKEN,
    assign_unique,
    assign_unique_sinkhorn,
    groups_of,
    shared_rows,
    with_dedup_token,
)
from tawin_nemo.util.errors import DataError


def family(size: int, codes: int, seed: int = 0) -> tuple[np.ndarray, Codebooks, np.ndarray]:
    """``size`` items with the codes (0, 0), one loner; first vectors are 0, so that latents are what is left."""
    rng = np.random.default_rng(seed)
    codes_IL = np.zeros((size + 1, 2), dtype=np.int32)
    codes_IL[-1] = (1, 0)
    vectors_LKD = np.stack([np.zeros((codes, 3)), rng.normal(size=(codes, 3))]).astype(np.float32)
    return codes_IL, Codebooks(vectors_LKD), rng.normal(size=(size + 1, 3)).astype(np.float32)


def test_groups_are_items_with_equal_codes() -> None:
    codes_IL = np.array([[1, 2], [0, 9], [1, 2], [0, 8], [1, 2]])
    assert [group.tolist() for group in groups_of(codes_IL)] == [[3], [1], [0, 2, 4]]
    assert shared_rows(codes_IL).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_the_cheapest_of_all(seed: int) -> None:
    codes_IL, books, latents_ID = family(4, 6, seed)
    found = assign_unique(codes_IL, books, latents_ID)
    cost = ((latents_ID[:4, None] - books.vectors_LKD[1]) ** 2).sum(-1)
    best = min(sum(cost[i, k] for i, k in enumerate(way)) for way in permutations(range(6), 4))
    assert cost[np.arange(4), found[:4, 1]].sum() == pytest.approx(best)
    assert len(set(found[:4, 1].tolist())) == 4
    assert found[:, 0].tolist() == codes_IL[:, 0].tolist()
    assert found[4].tolist() == [1, 0]  # an item without a double keeps its codes
    assert (codes_IL[:4] == 0).all()  # the input is not touched


def test_sinkhorn_tells_apart_and_a_full_family_fits() -> None:
    codes_IL, books, latents_ID = family(6, 6)
    for method in (assign_unique, assign_unique_sinkhorn):
        found = method(codes_IL, books, latents_ID)
        assert sorted(found[:6, 1].tolist()) == list(range(6))
        assert not shared_rows(found).any()


def test_equal_vectors_part_under_assign_and_are_named_under_sinkhorn_when_they_do_not() -> None:
    codes_IL, books, latents_ID = family(40, 64)
    latents_ID[:] = latents_ID[0]
    assert not shared_rows(assign_unique(codes_IL, books, latents_ID)).any()
    with pytest.raises(DataError, match=r"items 20, 21, 22, 23, 24 \.\.\. keep equal codes .*use assign or dedup"):
        assign_unique_sinkhorn(codes_IL, books, latents_ID)


def test_a_family_larger_than_the_codebook_moves_next_door_or_is_named() -> None:
    codes_IL, books, latents_ID = family(7, 6)
    found = assign_unique(codes_IL, books, latents_ID)
    assert not shared_rows(found).any()
    assert sorted(np.bincount(found[:7, 0]).tolist()) == [1, 6]
    with pytest.raises(DataError, match=r"7 items begin with the codes \[0\] and the last level has 6: items 0, 1"):
        assign_unique_sinkhorn(codes_IL, books, latents_ID)
    with pytest.raises(DataError, match=r"item \d: all 4 IDs that begin with \[\] are taken"):
        assign_unique(*family(4, 2))


def test_dedup_tokens_count_within_a_group() -> None:
    codes_IL = np.array([[1, 2], [0, 9], [1, 2], [0, 8], [1, 2]])
    assert with_dedup_token(codes_IL)[:, 2].tolist() == [0, NO_TOKEN, 1, NO_TOKEN, 2]
    assert not shared_rows(with_dedup_token(codes_IL)).any()


# -- Sinkhorn ------------------------------------------------------------------------------------------------------
def test_the_plan_equals_plain_scaling() -> None:
    """Oracle: Sinkhorn's matrix scaling as published, with plain exponentials and loops."""
    rng = np.random.default_rng(0)
    cost_NK, mass_K = rng.random((6, 4)), np.array([1.0, 2.0, 2.5, 0.5])
    kernel = np.exp(-cost_NK / 0.1)
    plan = kernel / kernel.sum(1, keepdims=True)
    for _ in range(200):
        plan = plan * (mass_K / plan.sum(0))
        plan = plan / plan.sum(1, keepdims=True)
    found = transport_plan(torch.from_numpy(cost_NK), torch.from_numpy(mass_K), epsilon=0.1, iterations=200)
    np.testing.assert_allclose(found.numpy(), plan, atol=1e-10)
    np.testing.assert_allclose(found.sum(0).numpy(), mass_K, atol=1e-6)
    np.testing.assert_allclose(found.sum(1).numpy(), 1, atol=1e-12)


def test_with_little_entropy_the_plan_is_the_optimal_assignment() -> None:
    rng = np.random.default_rng(3)
    cost_NK = rng.random((5, 5))
    plan = transport_plan(torch.from_numpy(cost_NK), torch.ones(5), epsilon=0.002, iterations=3000)
    best = min(permutations(range(5)), key=lambda way: sum(cost_NK[i, k] for i, k in enumerate(way)))
    assert tuple(plan.argmax(dim=1).tolist()) == best
