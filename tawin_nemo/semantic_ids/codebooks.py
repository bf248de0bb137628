"""Residual codebooks: an item is the sum of one vector per level, chosen greedily level by level.

I items, N rows, L levels, K codes per level, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

#: Rows that are held in memory beside the vectors themselves (which may be a memory-mapped file).
CHUNK_ROWS = 16_384


def nearest(x_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """The centre with the smallest squared distance to each row, int32 [N]; ties go to the lower number.

    Works in float32 in pieces of CHUNK_ROWS rows: memory beside ``x_ND`` is CHUNK_ROWS x K numbers.
    """
    centres = torch.from_numpy(np.ascontiguousarray(centres_KD, dtype=np.float32))
    half_norm_K = centres.square().sum(dim=1) / 2
    code_N = np.empty(len(x_ND), dtype=np.int32)
    for begin in range(0, len(x_ND), CHUNK_ROWS):
        rows = torch.from_numpy(np.array(x_ND[begin : begin + CHUNK_ROWS], dtype=np.float32))
        # |x - c|^2 / 2 without the part that is equal for all centres
        code_N[begin : begin + len(rows)] = torch.addmm(half_norm_K, rows, centres.T, alpha=-1).argmin(dim=1).numpy()
    return code_N


def squared_distances(x_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of N rows to K centres, [N, K] float64, never negative."""
    x, centres = x_ND.astype(np.float64), centres_KD.astype(np.float64)
    cross = x @ centres.T
    return np.maximum((x**2).sum(1)[:, None] - 2 * cross + (centres**2).sum(1), 0.0)


@dataclass(frozen=True, eq=False)
class Codebooks:
    """The code vectors ``vectors_LKD``, float32: L levels of K vectors of D dimensions."""

    vectors_LKD: np.ndarray

    @property
    def levels(self) -> int:
        """Number of code levels L."""
        return len(self.vectors_LKD)

    @property
    def codes(self) -> int:
        """Number of codes per level K."""
        return int(self.vectors_LKD.shape[1])

    def encode(self, x_ID: np.ndarray) -> np.ndarray:
        """Codes [I, L] int32: at every level the code nearest to the residual of the levels before."""
        codes_IL = np.empty((len(x_ID), self.levels), dtype=np.int32)
        for begin in range(0, len(x_ID), CHUNK_ROWS):
            residual = np.array(x_ID[begin : begin + CHUNK_ROWS], dtype=np.float32)
            for level, centres_KD in enumerate(self.vectors_LKD):
                code_N = nearest(residual, centres_KD)
                residual -= centres_KD[code_N]
                codes_IL[begin : begin + len(residual), level] = code_N
        return codes_IL

    def decode(self, codes_IL: np.ndarray) -> np.ndarray:
        """Sum of the code vectors, [I, D] float32; columns beyond the levels (dedup tokens) carry no vector."""
        total_ID = np.zeros((len(codes_IL), self.vectors_LKD.shape[2]), dtype=np.float32)
        for level, centres_KD in enumerate(self.vectors_LKD[: codes_IL.shape[1]]):
            total_ID += centres_KD[codes_IL[:, level]]
        return total_ID

    def residual(self, x_ID: np.ndarray, codes_IL: np.ndarray) -> np.ndarray:
        """Residual of all levels but the last, [I, D]: the last level's code is chosen for it."""
        return np.asarray(x_ID, dtype=np.float32) - self.decode(codes_IL[:, : self.levels - 1])


def mean_codebooks(x_ID: np.ndarray, codes_IL: np.ndarray, codes: int) -> Codebooks:
    """Codebooks for given codes: per level and code the mean residual of the levels before.

    For the codes of converged k-means these are its centres; for an index that came without codebooks they
    are the best that a greedy reader of its codes could have (least squares, one level after the other). A code that
    nothing uses has the zero vector.
    """
    residual = np.array(x_ID, dtype=np.float64)
    vectors_LKD = np.zeros((codes_IL.shape[1], codes, residual.shape[1]))
    for level, code_I in enumerate(codes_IL.T):
        totals_KD = vectors_LKD[level]
        np.add.at(totals_KD, code_I, residual)
        totals_KD /= np.maximum(np.bincount(code_I, minlength=codes), 1)[:, None]
        residual -= totals_KD[code_I]
    return Codebooks(vectors_LKD.astype(np.float32))
