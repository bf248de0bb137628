"""Quantisers by clustering against slow oracles: nearest codes, balanced assignment, residual k-means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from tawin_nemo.semantic_ids import codebooks as codebooks_module
from tawin_nemo.semantic_ids.clustering import (
    balanced_assignment,
    balanced_residual_kmeans,
    balanced_sizes,
    residual_kmeans,
)
from tawin_nemo.semantic_ids.codebooks import Codebooks, mean_codebooks, nearest, squared_distances
from tawin_nemo.util.errors import DataError
from tests.semantic_ids.vectors import blobs, relative_error

SMALL = {"levels": 3, "codes": 8, "iterations": 20, "seed": 3}


# -- codebooks -----------------------------------------------------------------------------------------------------
def test_nearest_is_the_nearest_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebooks_module, "CHUNK_ROWS", 7)
    rng = np.random.default_rng(0)
    x_ND, centres_KD = rng.normal(size=(50, 5)), rng.normal(size=(9, 5))
    slow = [min(range(9), key=lambda k: float(((x - centres_KD[k]) ** 2).sum())) for x in x_ND]
    assert nearest(x_ND, centres_KD).tolist() == slow
    np.testing.assert_allclose(
        squared_distances(x_ND, centres_KD), ((x_ND[:, None] - centres_KD) ** 2).sum(-1), atol=1e-12
    )


def test_encode_is_greedy_and_decode_sums_up() -> None:
    rng = np.random.default_rng(1)
    books = Codebooks(rng.normal(size=(3, 6, 4)).astype(np.float32))
    x_ID = rng.normal(size=(20, 4)).astype(np.float32)
    codes_IL = books.encode(x_ID)
    for x, codes_L in zip(x_ID, codes_IL, strict=True):
        residual = x.astype(np.float64)
        for level, code in enumerate(codes_L):
            distance_K = ((residual - books.vectors_LKD[level]) ** 2).sum(1)
            assert distance_K[code] <= distance_K.min() + 1e-5
            residual = residual - books.vectors_LKD[level, code]
    total = sum(books.vectors_LKD[level, codes_IL[:, level]] for level in range(3))
    np.testing.assert_allclose(books.decode(codes_IL), total, atol=1e-6)
    with_token = np.column_stack([codes_IL, np.full(20, -1)])
    np.testing.assert_array_equal(books.decode(with_token), books.decode(codes_IL))


def test_mean_codebooks_are_the_means_of_what_is_left() -> None:
    x_ID = np.array([[1.0, 0], [3, 0], [10, 2], [10, 4]])
    books = mean_codebooks(x_ID, np.array([[0, 1], [0, 0], [2, 1], [2, 0]]), 3)
    np.testing.assert_allclose(books.vectors_LKD[0], [[2, 0], [0, 0], [10, 3]])
    np.testing.assert_allclose(books.vectors_LKD[1], [[0.5, 0.5], [-0.5, -0.5], [0, 0]])


# -- balanced assignment -------------------------------------------------------------------------------------------
@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 7), st.booleans())
def test_balanced_assignment_costs_what_the_linear_assignment_costs(seed: int, rows: int, columns: int, tied: bool):
    """Oracle: one column per seat, solved by scipy. Costs with many ties, any sizes (also 0)."""
    rng = np.random.default_rng(seed)
    cost_NK = rng.integers(0, 4, (rows, columns)).astype(float) if tied else rng.random((rows, columns))
    sizes_K = rng.multinomial(rows, rng.dirichlet(np.ones(columns)))
    code_N, price_K = balanced_assignment(cost_NK, sizes_K)
    assert np.bincount(code_N, minlength=columns).tolist() == sizes_K.tolist()
    seats_NS = cost_NK[:, np.repeat(np.arange(columns), sizes_K)]
    best = seats_NS[linear_sum_assignment(seats_NS)].sum()
    paid_N = cost_NK[np.arange(rows), code_N]
    assert paid_N.sum() == pytest.approx(best, abs=1e-9)
    assert (paid_N + price_K[code_N] <= (cost_NK + price_K).min(axis=1) + 1e-9).all()  # the prices prove it


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sizes with sum 5 do not fit costs of shape"):
        balanced_assignment(np.ones((4, 2)), np.array([2, 3]))


def test_balanced_sizes_go_to_the_most_wanted() -> None:
    assert balanced_sizes(np.array([5, 0, 9]), 8).tolist() == [3, 2, 3]


def test_every_level_is_balanced() -> None:
    x_ID = blobs(203)
    books, codes_IL = balanced_residual_kmeans(x_ID, **SMALL)
    for code_I in codes_IL.T:
        assert set(np.bincount(code_I, minlength=8)) == {25, 26}
    again = balanced_residual_kmeans(x_ID, **SMALL)
    np.testing.assert_array_equal(codes_IL, again[1])
    np.testing.assert_allclose(books.vectors_LKD, mean_codebooks(x_ID, codes_IL, 8).vectors_LKD, atol=1e-5)


# -- residual k-means ----------------------------------------------------------------------------------------------
def test_residual_kmeans_finds_blobs_and_each_level_helps() -> None:
    x_ID = blobs(400, kinds=8)
    books, codes_IL = residual_kmeans(x_ID, **SMALL)
    kind_I = np.arange(400) % 8
    assert len(set(zip(kind_I.tolist(), codes_IL[:, 0].tolist(), strict=True))) == 8  # one first code per blob
    errors = [relative_error(x_ID, books.decode(codes_IL[:, :levels])) for levels in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    np.testing.assert_array_equal(books.encode(x_ID), codes_IL)


def test_equal_seeds_give_equal_codes_and_others_do_not() -> None:
    x_ID = np.random.default_rng(5).normal(size=(300, 6)).astype(np.float32)
    first, second = (residual_kmeans(x_ID, **SMALL)[1] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, residual_kmeans(x_ID, **(SMALL | {"seed": 9}))[1])


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("method", [residual_kmeans, balanced_residual_kmeans])
def test_too_few_items_or_different_ones_are_named(method) -> None:
    with pytest.raises(DataError, match=r"5 items cannot fill semantic_ids\.codes=8"):
        method(blobs(5), **SMALL)
    alike = blobs(40)
    alike[3:37] = alike[3]
    with pytest.raises(DataError, match=r"level 1 has 7 different vectors .*items 3, 4, 5, 6, 7 \.\.\."):
        method(alike, **SMALL)
    with pytest.raises(DataError, match=r"level 1 has 1 different .*\.\.\.\); give the items different texts$"):
        method(np.ones((40, 4), np.float32), **SMALL)  # no remedy by codes or levels, and no division by zero
