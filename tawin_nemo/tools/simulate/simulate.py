"""Figure 3 of TAWin (arXiv 2604.22504): which window's WPAUC goes with Recall@K, by simulation and exactly.

10 positives and 200 negatives in random order; over many such lists, the Pearson correlation of WPAUC(alpha, d) with
Recall@K for *every* window that the 200 negatives allow. Let A_j be the number of positives ahead of the j-th best
negative: WPAUC is the mean of A_j over the window divided by P, so all correlations follow from the covariances of A
with itself and with the hits in the top K, and one pass over the trials is enough. Those covariances also have a closed
form, which says what the simulation converges to.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tawin_nemo.maths.auc import recall_window, window_ranks
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.files import write_json
from tawin_nemo.util.log import progress, say

POSITIVES, NEGATIVES = 10, 200
CUTOFFS = (10, 20, 30, 50, 100)
#: Cut-offs at which the exact maximiser is drawn.
CURVE = tuple(range(POSITIVES, NEGATIVES + 1, 5))
#: Trials whose lists are held in memory at once (about 10 MB).
CHUNK = 1_000


@dataclass(frozen=True)
class Options:
    trials: int = 10_000
    seed: int = 0
    output: str = "runs/simulate"

    @classmethod
    def parse(cls, overrides: Sequence[str]) -> Options:
        """``key=value`` items. Raises ConfigError for an unknown key, a value that is no number or too small."""
        names = [field.name for field in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for item in overrides:
            key, equals, text = item.partition("=")
            if not equals or key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(names)}"
                raise ConfigError(f"simulate does not know {item!r}; {hint} (simulate trials=10000 seed=0 output=DIR)")
            values[key] = text if key == "output" else _whole_number(key, text, at_least=2 if key == "trials" else 0)
        options = cls(**values)
        if not options.output:
            raise ConfigError("output= is empty; name the folder for figure3.png and figure3.json")
        return options


@dataclass(frozen=True)
class Moments:
    """Covariances, up to one common factor, of A (positives ahead of each negative) and of the hits in the top K."""

    cutoffs: tuple[int, ...]
    ahead_NN: np.ndarray  # cov(A_i, A_j)
    ahead_hits_NK: np.ndarray  # cov(A_j, hits in the top K)
    hits_K: np.ndarray  # var(hits in the top K)


@dataclass(frozen=True)
class Peak:
    """A window and the correlation of its WPAUC with Recall@K."""

    alpha: float
    d: float
    correlation: float


def run(overrides: Sequence[str]) -> dict[str, Any]:
    """The verb: simulate, write ``figure3.png`` and ``figure3.json``, return the summary for the last line."""
    from tawin_nemo.tools.simulate.figure import draw

    options = Options.parse(overrides)
    begin = time.perf_counter()
    folder = Path(options.output)
    maps_KSE = correlations(simulate(options.trials, options.seed))
    rows = summarise(maps_KSE, correlations(exact_moments()))
    curve = [best_window(map_SE) for map_SE in correlations(exact_moments(cutoffs=CURVE))]
    title = (
        f"Which windowed AUC goes with Recall@K: {POSITIVES} positives, {NEGATIVES} negatives, {options.trials:,} lists"
    )
    draw(folder / "figure3.png", maps_KSE, rows, dict(zip(CURVE, curve, strict=True)), title=title)
    facts = {
        "trials": options.trials,
        "seed": options.seed,
        "positives": POSITIVES,
        "negatives": NEGATIVES,
        "windows": math.comb(NEGATIVES + 1, 2),
        "seconds": round(time.perf_counter() - begin, 2),
    }
    command = " ".join(["python -m tawin_nemo simulate", *overrides])
    write_json(folder / "figure3.json", {"command": command, **facts, "cutoffs": rows})
    say("Figure 3 is drawn", path=folder / "figure3.png")
    columns = ("argmax_alpha", "argmax_d", "correlation", "predicted_alpha", "exact_argmax_alpha")
    return {
        **{column: {k: row[column] for k, row in rows.items()} for column in columns},
        **facts,
        "output": str(folder),
    }


def simulate(
    trials: int, seed: int, *, positives: int = POSITIVES, negatives: int = NEGATIVES, cutoffs: Sequence[int] = CUTOFFS
) -> Moments:
    """Moments over ``trials`` random lists, best item first. Sums of whole numbers, so their order does not matter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(positives + negatives) < positives
    total = np.zeros(negatives + len(cutoffs))
    products = np.zeros((len(total), len(total)))
    for start in progress(range(0, trials, CHUNK), what="simulate"):
        size = min(CHUNK, trials - start)
        lists_TI = rng.permuted(np.tile(labels, (size, 1)), axis=1)
        found_TI = lists_TI.cumsum(axis=1)  # positives among the first items of each list
        ahead_TN = found_TI[~lists_TI].reshape(size, negatives)
        hits_TK = found_TI[:, np.array(cutoffs) - 1]
        values_T = np.concatenate([ahead_TN, hits_TK], axis=1).astype(np.float64)
        total += values_T.sum(axis=0)
        products += values_T.T @ values_T
    # Not divided by trials: up to 40,000 trials every entry and every sum over a window is a whole number below 2^53.
    covariance = trials * products - np.outer(total, total)
    n = negatives
    return Moments(tuple(cutoffs), covariance[:n, :n], covariance[:n, n:], covariance[n:, n:].diagonal())


def exact_moments(positives: int = POSITIVES, negatives: int = NEGATIVES, cutoffs: Sequence[int] = CUTOFFS) -> Moments:
    """The limit of ``simulate`` for infinitely many trials.

    The N negatives leave N + 1 gaps; the positives fall into them by a Dirichlet-multinomial law with all weights 1,
    so with ``g = N + 1`` and ``i <= j``: ``cov(A_i, A_j) = P (i / g)(1 - j / g)(P + g) / (1 + g)``. The hits h in the
    top K are hypergeometric. Given h, the list's two parts are in random order, each for itself, hence
    ``E[A_j | h] = h j / (K - h + 1)`` for a negative in the top K (``j <= K - h``), and for one behind it
    ``h + (P - h)(j - K + h) / (N - K + h + 1)``.
    """
    g, j_N = negatives + 1, np.arange(1, negatives + 1)
    low_NN, high_NN = np.minimum.outer(j_N, j_N), np.maximum.outer(j_N, j_N)
    ahead_NN = positives * (low_NN / g) * (1 - high_NN / g) * (positives + g) / (1 + g)
    ahead_hits, hits = [], []
    for k in cutoffs:
        covariance_N, variance = np.zeros(negatives), 0.0
        mean = k * positives / (positives + negatives)
        for h in range(max(0, k - negatives), min(k, positives) + 1):
            ways = math.comb(positives, h) * math.comb(negatives, k - h) / math.comb(positives + negatives, k)
            inside = k - h  # negatives in the top K
            behind_N = np.maximum(j_N - inside, 0)
            ahead_N = np.where(
                j_N <= inside, h * j_N / (inside + 1), h + (positives - h) * behind_N / (negatives - inside + 1)
            )
            covariance_N += ways * (h - mean) * ahead_N
            variance += ways * (h - mean) ** 2
        ahead_hits.append(covariance_N)
        hits.append(variance)
    return Moments(tuple(cutoffs), ahead_NN, np.stack(ahead_hits, axis=1), np.array(hits))


def correlations(moments: Moments) -> np.ndarray:
    """Pearson correlation of WPAUC with Recall@K for every window ``start < j <= end`` of negatives: [K, N+1, N+1].

    Entry [K, start, end]; NaN where ``start >= end`` or where one of the two did not vary. The mean over a window
    differs from the sum by a factor that a correlation does not see; sums over windows are differences of prefix sums.

    Raises:
        ConfigError: Recall@K was the same in all trials for some K.
    """
    n = len(moments.ahead_NN)
    prefix = np.zeros((n + 1, n + 1))
    prefix[1:, 1:] = moments.ahead_NN.cumsum(axis=0).cumsum(axis=1)
    own = prefix.diagonal()
    variance_SE = own[None, :] + own[:, None] - 2 * prefix
    upper_SE = np.triu(np.ones_like(prefix, dtype=bool), 1)
    # What is left of a variance of 0 by rounding is far below this share of the largest one.
    varies_SE = upper_SE & (variance_SE > 1e-12 * variance_SE.max())
    maps = []
    for k, covariance_N, hits in zip(moments.cutoffs, moments.ahead_hits_NK.T, moments.hits_K, strict=True):
        if hits <= 0:
            raise ConfigError(f"Recall@{k} was the same in all trials, so it has no correlation; raise trials=")
        sums = np.concatenate([[0.0], covariance_N.cumsum()])
        covariance_SE = sums[None, :] - sums[:, None]
        map_SE = np.full_like(prefix, np.nan)
        map_SE[varies_SE] = covariance_SE[varies_SE] / np.sqrt(variance_SE[varies_SE] * hits)
        maps.append(map_SE)
    return np.stack(maps)


def best_window(map_SE: np.ndarray) -> Peak:
    """The window of the largest correlation; among equals the one that starts, then ends, first."""
    start, end = np.unravel_index(np.nanargmax(map_SE), map_SE.shape)
    return _peak(map_SE, int(start), int(end))


def summarise(maps_KSE: np.ndarray, exact_KSE: np.ndarray) -> dict[str, dict[str, Any]]:
    """One row per K: the maximiser, the exact one, the window of Theorem 3.4, the best OPAUC, and AUC."""
    rows: dict[str, dict[str, Any]] = {}
    n = maps_KSE.shape[1] - 1
    for k, map_SE, exact_SE in zip(CUTOFFS, maps_KSE, exact_KSE, strict=True):
        peak, exact = best_window(map_SE), best_window(exact_SE)
        start, end = window_ranks(*recall_window(k, POSITIVES, NEGATIVES), NEGATIVES)
        theorem = _peak(map_SE, start, end)
        same_width = map_SE.diagonal(end - start)
        from_top = np.full_like(map_SE, np.nan)
        from_top[0] = map_SE[0]
        rows[str(k)] = {
            "argmax_alpha": peak.alpha,
            "argmax_d": peak.d,
            "correlation": peak.correlation,
            "predicted_alpha": theorem.alpha,
            "predicted_d": theorem.d,
            "predicted_correlation": theorem.correlation,
            "argmax_alpha_at_predicted_d": int(np.nanargmax(same_width)) / n,
            "exact_argmax_alpha": exact.alpha,
            "exact_argmax_d": exact.d,
            "exact_correlation": exact.correlation,
            "best_opauc_beta": best_window(from_top).d,
            "best_opauc_correlation": best_window(from_top).correlation,
            "auc_correlation": _peak(map_SE, 0, n).correlation,
        }
    return rows


def _peak(map_SE: np.ndarray, start: int, end: int) -> Peak:
    n = len(map_SE) - 1
    return Peak(start / n, (end - start) / n, round(float(map_SE[start, end]), 4))


def _whole_number(key: str, text: str, *, at_least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"{key}={text} is not a whole number; for example {key}={max(at_least, 1)}") from None
    if value < at_least:
        reason = " (a correlation needs two trials)" if key == "trials" else ""
        raise ConfigError(f"{key}={value} is too small; use {key}={at_least} or more{reason}")
    return value
