"""Residual k-means, plain and balanced, and assignments of rows to codes of given sizes: optimal, and by Sinkhorn.

N rows, K codes of one level, R rows of one code; I items, L levels, D dimensions.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from tawin_nemo.semantic_ids.codebooks import Codebooks, nearest, squared_distances
from tawin_nemo.util.errors import DataError
from tawin_nemo.util.log import progress

#: k-means++ looks at this many rows per code; it is sequential, and more rows hardly change its choice.
SEEDING_ROWS_PER_CODE = 32
#: Two residuals nearer than this share of the vectors' spread count as the same.
SAME = 1e-6


def kmeans_centres(x_ND: np.ndarray, codes: int, *, iterations: int, seed: int) -> np.ndarray:
    """scikit-learn's Lloyd iterations from one k-means++ seeding on a sample, [K, D] float32."""
    from sklearn.cluster import KMeans

    centres_KD = seeds(x_ND, codes, seed)
    model = KMeans(codes, init=centres_KD, n_init=1, max_iter=iterations, random_state=seed)
    return model.fit(x_ND).cluster_centers_.astype(np.float32)


def seeds(x_ND: np.ndarray, codes: int, seed: int) -> np.ndarray:
    """Initial centres [K, D]: k-means++ on a random sample of the rows."""
    from sklearn.cluster import kmeans_plusplus  # scikit-learn takes a second to import

    count = min(len(x_ND), SEEDING_ROWS_PER_CODE * codes)
    sample = np.sort(np.random.default_rng(seed).choice(len(x_ND), count, replace=False))
    return kmeans_plusplus(x_ND[sample], codes, random_state=seed)[0]


def residual_kmeans(
    x_ID: np.ndarray, *, levels: int, codes: int, iterations: int, seed: int
) -> tuple[Codebooks, np.ndarray]:
    """Codebooks and codes [I, L]. Equal vectors, sizes and seed give equal results on one machine.

    Raises DataError for fewer items than codes, or a level that has fewer different residuals than codes.
    """
    check_enough_items(len(x_ID), codes)
    spread = total_std(x_ID)
    residual = np.array(x_ID, dtype=np.float32)
    centres_LKD, codes_LI = [], []
    for level in progress(range(levels), what="residual k-means, levels"):
        check_enough_distinct(residual, codes, level, spread)
        centres_KD = kmeans_centres(residual, codes, iterations=iterations, seed=seed + level)
        code_I = nearest(residual, centres_KD)
        residual -= centres_KD[code_I]
        centres_LKD.append(centres_KD)
        codes_LI.append(code_I)
    return Codebooks(np.stack(centres_LKD)), np.stack(codes_LI, axis=1)


def total_std(x_ID: np.ndarray) -> float:
    """Total standard deviation: the root of the mean squared distance of I vectors to their mean."""
    return float(np.sqrt(x_ID.var(axis=0, dtype=np.float64).sum()))


def check_enough_items(items: int, codes: int) -> None:
    """Raise DataError if there are fewer items than codes in one level."""
    if items < codes:
        raise DataError(
            f"{items} items cannot fill semantic_ids.codes={codes} codes of one level; "
            f"set semantic_ids.codes to {items} or less"
        )


def check_enough_distinct(rest_ID: np.ndarray, codes: int, level: int, spread: float) -> None:
    """Raise DataError if a level has fewer distinct residuals than codes; ``level`` counts from 0."""
    # a random direction tells different rows apart (almost surely) at the cost of one product
    direction_D = np.random.default_rng(0).normal(size=rest_ID.shape[1])
    along_I = rest_ID @ direction_D
    bin_I = np.round(along_I / (spread * SAME)) if spread > np.finfo(np.float32).tiny else np.zeros(len(rest_ID))
    different, first_I, count_I = np.unique(bin_I, return_index=True, return_counts=True)
    if len(different) >= codes:
        return
    most = int(count_I.argmax())
    alike = np.flatnonzero(bin_I == bin_I[first_I[most]])[:5].tolist()
    remedies = [f"set semantic_ids.codes to {len(different)} or less"] if len(different) > 1 else []
    remedies += [f"set semantic_ids.levels to {level}"] if level > 1 else []
    remedies += ["give the items different texts"]
    raise DataError(
        f"level {level + 1} has {len(different)} different vectors for semantic_ids.codes={codes} codes (equal there: "
        f"items {', '.join(map(str, alike))}{' ...' if count_I[most] > 5 else ''}); {', or '.join(remedies)}"
    )


def balanced_assignment(cost_NK: np.ndarray, sizes_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest way to give row i one column so that column k is given ``sizes_K[k]`` times.

    Returns int32 codes [N] and prices [K] at which no row would gain by another column.

    A transportation problem, solved exactly by successive shortest paths: every row starts at its cheapest column,
    which is optimal for the counts that this gives, and rows are then moved from overfull to
    unfilled columns along paths of least extra cost, which keeps it optimal (Ahuja, Magnanti, Orlin, Network Flows,
    Section 9.7). The graph has K nodes, so that the cost grows with the rows that have to move, not with N^3.
    Raises ValueError for sizes that do not sum to N.
    """
    if cost_NK.shape[1] != len(sizes_K) or sizes_K.sum() != len(cost_NK) or (sizes_K < 0).any():
        raise ValueError(f"{len(sizes_K)} sizes with sum {sizes_K.sum()} do not fit costs of shape {cost_NK.shape}")
    flow = _Flow(cost_NK.astype(np.float64), sizes_K.astype(np.int64))
    while flow.push():
        pass
    return flow.code_N.astype(np.int32), flow.price_K


class _Flow:
    """Rows at columns, with prices at which no row would gain by moving: cost + price is least where each row is."""

    def __init__(self, cost_NK: np.ndarray, sizes_K: np.ndarray) -> None:
        self.cost_NK, self.sizes_K = cost_NK, sizes_K
        self.price_K = np.zeros(len(sizes_K))
        self.code_N = cost_NK.argmin(axis=1)
        self.count_K = np.bincount(self.code_N, minlength=len(sizes_K))
        # what it costs to move one row from column a to column b, and the row for which it costs least
        self.step_KK = np.full((len(sizes_K), len(sizes_K)), np.inf)
        self.row_KK = np.full((len(sizes_K), len(sizes_K)), -1)
        self._refresh(np.arange(len(sizes_K)))

    def push(self) -> bool:
        """Move rows along shortest paths to columns that are not full; False when all are."""
        if (self.count_K == self.sizes_K).all():
            return False
        distance_K, parent_K = self._shortest_paths()
        self.price_K -= distance_K  # now every step of the paths costs nothing, and no step less than nothing
        touched: set[int] = set()
        for target in np.argsort(distance_K, kind="stable"):
            if self.count_K[target] < self.sizes_K[target]:
                path = self._path_to(int(target), parent_K)
                # a column that has changed no longer has the steps that were measured
                if not touched & set(path) and self.count_K[path[-1]] > self.sizes_K[path[-1]]:
                    self._move_along(path)
                    touched |= set(path)
        self._refresh(np.array(sorted(touched)))
        return True

    def _shortest_paths(self) -> tuple[np.ndarray, np.ndarray]:
        """Distance from the nearest overfull column, and the column before on that path (negative = none)."""
        reduced_KK = np.maximum(self.step_KK + self.price_K - self.price_K[:, None], 0.0)  # below 0 only by rounding
        from_E, to_E = np.nonzero(np.isfinite(reduced_KK))
        # sparse, since a dense graph would take steps that cost nothing for missing ones
        graph = csr_array((reduced_KK[from_E, to_E], (from_E, to_E)), shape=reduced_KK.shape)
        overfull = np.flatnonzero(self.count_K > self.sizes_K)
        distance_K, parent_K, _ = dijkstra(graph, indices=overfull, min_only=True, return_predecessors=True)
        return distance_K, parent_K

    def _path_to(self, target: int, parent_K: np.ndarray) -> list[int]:
        path = [target]
        while parent_K[path[-1]] >= 0:
            path.append(int(parent_K[path[-1]]))
        return path

    def _move_along(self, path: list[int]) -> None:
        for to, source in pairwise(path):
            self.code_N[self.row_KK[source, to]] = to
        self.count_K[path[0]] += 1
        self.count_K[path[-1]] -= 1

    def _refresh(self, columns: np.ndarray) -> None:
        """Steps out of the columns whose rows have changed."""
        for column in columns:
            rows = np.flatnonzero(self.code_N == column)
            self.step_KK[column] = np.inf
            if len(rows):
                gain_RK = self.cost_NK[rows] - self.cost_NK[rows, column][:, None]
                best_K = gain_RK.argmin(axis=0)
                self.step_KK[column] = gain_RK[best_K, np.arange(len(best_K))]
                self.row_KK[column] = rows[best_K]
            self.step_KK[column, column] = np.inf


def balanced_sizes(wanted_K: np.ndarray, total: int) -> np.ndarray:
    """Sizes that differ by one at most and sum to ``total``; the larger ones go to the columns wanted most."""
    sizes_K = np.full(len(wanted_K), total // len(wanted_K), dtype=np.int64)
    sizes_K[np.argsort(-wanted_K, kind="stable")[: total % len(wanted_K)]] += 1
    return sizes_K


def balanced_kmeans(x_ND: np.ndarray, codes: int, *, iterations: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [K, D] float32 and codes [N] int32, each code on floor(N / K) or ceil(N / K) rows.

    Lloyd's iterations in which the assignment is the cheapest balanced one (Bradley, Bennett, Demiriz 2000,
    "Constrained k-means clustering"). Ends when the assignment repeats.
    """
    centres_KD = seeds(x_ND, codes, seed)
    code_N = np.full(len(x_ND), -1, dtype=np.int32)
    for _ in progress(range(iterations), what="balanced k-means"):
        cost_NK = squared_distances(x_ND, centres_KD)
        wanted_K = np.bincount(cost_NK.argmin(axis=1), minlength=codes)
        before = code_N
        code_N, _ = balanced_assignment(cost_NK, balanced_sizes(wanted_K, len(x_ND)))
        if np.array_equal(before, code_N):
            break
        centres_KD = _means(x_ND, code_N, codes)
    return _means(x_ND, code_N, codes), code_N


def _means(x_ND: np.ndarray, code_N: np.ndarray, codes: int) -> np.ndarray:
    totals_KD = np.zeros((codes, x_ND.shape[1]))
    np.add.at(totals_KD, code_N, x_ND)
    return (totals_KD / np.bincount(code_N, minlength=codes)[:, None]).astype(np.float32)


def balanced_residual_kmeans(
    x_ID: np.ndarray, *, levels: int, codes: int, iterations: int, seed: int
) -> tuple[Codebooks, np.ndarray]:
    """Residual k-means with balanced sizes at every level: codebooks, codes [I, L].

    The codes are the balanced ones, not always the nearest. Raises DataError for fewer items than codes, or a
    level that has fewer different residuals than codes.
    """
    check_enough_items(len(x_ID), codes)
    spread = total_std(x_ID)
    residual = np.array(x_ID, dtype=np.float32)
    centres_LKD, codes_LI = [], []
    for level in range(levels):
        check_enough_distinct(residual, codes, level, spread)
        centres_KD, code_I = balanced_kmeans(residual, codes, iterations=iterations, seed=seed + level)
        residual -= centres_KD[code_I]
        centres_LKD.append(centres_KD)
        codes_LI.append(code_I)
    return Codebooks(np.stack(centres_LKD)), np.stack(codes_LI, axis=1)


def transport_plan(cost_NK: Tensor, mass_K: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Plan [N, K] whose rows sum to 1 and whose columns sum (nearly) to ``mass_K`` (which sums to N).

    Minimises <plan, cost> - epsilon * entropy(plan) by Sinkhorn's alternating scaling in log space (Cuturi 2013,
    Algorithm 1). ``epsilon`` is in units of the cost. Rows are scaled last and hold exactly; the columns converge
    linearly in ``iterations``.
    """
    log_kernel_NK, log_mass_K = -cost_NK / epsilon, mass_K.to(cost_NK.dtype).log()
    column_K = torch.zeros_like(log_mass_K)
    row_N = -log_kernel_NK.logsumexp(dim=1)
    for _ in range(iterations):
        column_K = log_mass_K - (log_kernel_NK + row_N[:, None]).logsumexp(dim=0)
        row_N = -(log_kernel_NK + column_K).logsumexp(dim=1)
    return (log_kernel_NK + row_N[:, None] + column_K).exp()
