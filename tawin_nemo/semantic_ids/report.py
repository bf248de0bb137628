"""Quality report of an index: use of the codes, collisions, shape of its trie, error, purity; and a plot.

I items, N items or rows out of them, L levels, K codes, C first codes, P pairs, D dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tawin_nemo.semantic_ids.codebooks import mean_codebooks
from tawin_nemo.semantic_ids.collisions import NO_TOKEN, groups_of, shared_rows
from tawin_nemo.util.files import atomic_path

#: Pairs of items that purity is measured on, per kind.
PAIRS = 100_000
#: Items in the plot; more would only cover each other.
PLOTTED_ITEMS = 20_000
LINE_STYLES = ("-", "--", ":", "-.")
_WORDS = re.compile(r"[^\W_]{2,}")


@dataclass(frozen=True)
class LevelUse:
    """One level: codes that some item has, entropy of their frequencies in bits, share of the most frequent one."""

    used: int
    entropy_bits: float
    largest_share: float


@dataclass(frozen=True)
class Purity:
    """Share of item pairs with a common word of brand or category: pairs with one first code, and any pairs."""

    same_first_code: float
    any_two: float
    items_with_words: int


@dataclass(frozen=True)
class IndexReport:
    """Rates are shares of 1. Errors are squared distances as a share of the vectors' variance (0 = exact).

    ``reconstruction_error``: by the tokenizer's own decoder; None for an index without one. ``refit_error``: by the
    best codebooks for these codes (``mean_codebooks``), so that indexes of any origin compare; both use the tokens that
    every item has. ``prefixes``: different beginnings of 1, 2, ... tokens, that is the nodes of the trie per depth.
    """

    items: int
    levels: list[LevelUse]
    tokens_mean: float
    items_with_more_tokens: int  # than every item has: those with a dedup token
    distinct: int
    distinct_without_dedup: int
    collision_rate: float  # 1 - distinct / items
    items_sharing: int
    shared_test_rows: float
    prefixes: list[int]
    largest_family: int  # items that agree up to the last level
    refit_error: float
    reconstruction_error: float | None
    purity: Purity | None


def measure(
    codes_IL: np.ndarray,
    levels: int,
    x_ID: np.ndarray,
    *,
    test_target_N: np.ndarray,
    read_ID: np.ndarray | None = None,
    words: Sequence[frozenset[str]] = (),
    seed: int = 0,
) -> IndexReport:
    """Report of an index with ``levels`` tokens for every item and perhaps more columns (NO_TOKEN = none).

    ``test_target_N``: item of each test row. ``read_ID``: vectors decoded from the codes. ``words``: of each item's
    brand and category, see ``word_sets``; empty = purity is not measured. ``seed`` draws the pairs.
    """
    base_IL = codes_IL[:, :levels]
    shared_I = shared_rows(codes_IL)
    distinct = len(groups_of(codes_IL))
    books = mean_codebooks(x_ID, base_IL, int(base_IL.max()) + 1)
    return IndexReport(
        items=len(codes_IL),
        levels=[level_use(code_I) for code_I in base_IL.T],
        tokens_mean=float((codes_IL != NO_TOKEN).sum(axis=1).mean()),
        items_with_more_tokens=int((codes_IL[:, levels:] != NO_TOKEN).any(axis=1).sum()),
        distinct=distinct,
        distinct_without_dedup=len(groups_of(base_IL)),
        collision_rate=1 - distinct / len(codes_IL),
        items_sharing=int(shared_I.sum()),
        shared_test_rows=float(shared_I[test_target_N].mean()) if len(test_target_N) else 0.0,
        prefixes=[len(groups_of(codes_IL[:, : depth + 1])) for depth in range(codes_IL.shape[1])],
        largest_family=max(map(len, groups_of(base_IL[:, :-1]))),
        refit_error=relative_error(x_ID, books.decode(base_IL)),
        reconstruction_error=None if read_ID is None else relative_error(x_ID, read_ID),
        purity=purity(base_IL[:, 0], words, seed) if words else None,
    )


def level_use(code_I: np.ndarray) -> LevelUse:
    """Codes in use, entropy in bits and largest share of one level, from the code of each item."""
    share_K = np.bincount(code_I) / len(code_I)
    share_K = share_K[share_K > 0]
    return LevelUse(len(share_K), float(-(share_K * np.log2(share_K)).sum()), float(share_K.max()))


def relative_error(x_ID: np.ndarray, read_ID: np.ndarray) -> float:
    """Mean squared error as a share of the variance (1 - R^2)."""
    x = x_ID.astype(np.float64)
    return float(np.square(x - read_ID).sum() / np.square(x - x.mean(axis=0)).sum())


def word_sets(texts: Sequence[str]) -> list[frozenset[str]]:
    """Words of two or more letters or digits, lower case, of every text."""
    return [frozenset(_WORDS.findall(text.lower())) for text in texts]


def purity(first_I: np.ndarray, words: Sequence[frozenset[str]], seed: int) -> Purity | None:
    """Share of item pairs with a common word: among pairs with the same first code, and among random pairs.

    From at most PAIRS random pairs each, an item never with itself. Items without words are skipped; None if no two
    items with words have one first code.
    """
    items_N = np.array([item for item, own in enumerate(words) if own], dtype=np.int64)
    if len(items_N) < 2:
        return None
    rng = np.random.default_rng(seed)
    order_N = items_N[np.argsort(first_I[items_N], kind="stable")]
    _, start_C, size_C = np.unique(first_I[order_N], return_index=True, return_counts=True)
    pairs_C = size_C * (size_C - 1.0)
    if not pairs_C.sum():
        return None
    count = int(min(PAIRS, pairs_C.sum()))
    code_P = rng.choice(len(size_C), count, p=pairs_C / pairs_C.sum())
    left_P, right_P = _two_of(size_C[code_P], rng)
    inside = order_N[start_C[code_P] + left_P], order_N[start_C[code_P] + right_P]
    left_P, right_P = _two_of(np.full(count, len(items_N)), rng)
    return Purity(_common(words, *inside), _common(words, items_N[left_P], items_N[right_P]), len(items_N))


def _two_of(size_P: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two different numbers below each size."""
    left_P = rng.integers(0, size_P)
    return left_P, (left_P + rng.integers(1, size_P)) % size_P


def _common(words: Sequence[frozenset[str]], left_P: np.ndarray, right_P: np.ndarray) -> float:
    return float(
        np.mean([not words[a].isdisjoint(words[b]) for a, b in zip(left_P.tolist(), right_P.tolist(), strict=True)])
    )


def plot_index(path: Path, x_ID: np.ndarray, codes_IL: np.ndarray, levels: int, *, title: str, seed: int = 0) -> None:
    """Write a picture of an index as PNG, atomically.

    Left: the first two principal components of a sample of the items; colours repeat every 20 first codes. Right: items
    per code, most frequent first; a flat line is an evenly used level.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    plane, use = figure.subplots(1, 2)
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(len(x_ID), min(len(x_ID), PLOTTED_ITEMS), replace=False))
    centred_ND = x_ID[sample].astype(np.float64) - x_ID[sample].mean(axis=0)
    axes_D2 = np.linalg.eigh(centred_ND.T @ centred_ND)[1][:, :-3:-1]
    across_N, up_N = (centred_ND @ axes_D2).T
    plane.scatter(across_N, up_N, c=codes_IL[sample, 0] % 20, cmap="tab20", s=6, linewidths=0)
    plane.set(title="items, by first code", xlabel="principal component 1", ylabel="principal component 2")
    for level, code_I in enumerate(codes_IL[:, :levels].T):
        count_K = np.sort(np.bincount(code_I))[::-1]
        use.plot(count_K, LINE_STYLES[level % len(LINE_STYLES)], label=f"level {level + 1}")
    use.set(title="use of the codes", xlabel="code, most frequent first", ylabel="items")
    use.legend(frameon=False)
    figure.suptitle(title, fontweight="bold")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})
