"""Residual k-means (RQ-k-means): k-means on the vectors, then on what it leaves over, and so on."""

from __future__ import annotations

import numpy as np

from tawin_nemo.semantic_ids.codebooks import Codebooks, nearest
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
    """First centres: k-means++ on a random sample of the rows."""
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
    refuse_few_items(len(x_ID), codes)
    spread = spread_of(x_ID)
    rest = np.array(x_ID, dtype=np.float32)
    centres_LKD, codes_LI = [], []
    for level in progress(range(levels), what="residual k-means, levels"):
        refuse_few_different(rest, codes, level, spread)
        centres_KD = kmeans_centres(rest, codes, iterations=iterations, seed=seed + level)
        code_I = nearest(rest, centres_KD)
        rest -= centres_KD[code_I]
        centres_LKD.append(centres_KD)
        codes_LI.append(code_I)
    return Codebooks(np.stack(centres_LKD)), np.stack(codes_LI, axis=1)


def spread_of(x_ID: np.ndarray) -> float:
    """Root of the mean squared distance to the mean."""
    return float(np.sqrt(x_ID.var(axis=0, dtype=np.float64).sum()))


def refuse_few_items(items: int, codes: int) -> None:
    """Raise DataError if there are fewer items than codes in one level."""
    if items < codes:
        raise DataError(
            f"{items} items cannot fill semantic_ids.codes={codes} codes of one level; "
            f"set semantic_ids.codes to {items} or less"
        )


def refuse_few_different(rest_ID: np.ndarray, codes: int, level: int, spread: float) -> None:
    """A level with fewer different rows than codes would leave codes without a meaning."""
    # a random direction tells different rows apart (almost surely) at the cost of one product
    direction_D = np.random.default_rng(0).normal(size=rest_ID.shape[1])
    along_I = rest_ID @ direction_D
    place_I = np.round(along_I / (spread * SAME)) if spread > np.finfo(np.float32).tiny else np.zeros(len(rest_ID))
    different, first_I, count_I = np.unique(place_I, return_index=True, return_counts=True)
    if len(different) >= codes:
        return
    most = int(count_I.argmax())
    alike = np.flatnonzero(place_I == place_I[first_I[most]])[:5].tolist()
    remedies = [f"set semantic_ids.codes to {len(different)} or less"] if len(different) > 1 else []
    remedies += [f"set semantic_ids.levels to {level}"] if level > 1 else []
    remedies += ["give the items different texts"]
    raise DataError(
        f"level {level + 1} has {len(different)} different vectors for semantic_ids.codes={codes} codes (equal there: "
        f"items {', '.join(map(str, alike))}{' ...' if count_I[most] > 5 else ''}); {', or '.join(remedies)}"
    )
