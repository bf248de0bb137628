"""The picture of an index: the items in the plane, coloured by first code, and how evenly each level is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tawin_nemo.util.files import atomic_path

#: More items than this would only paint over each other.
POINTS = 20_000
LINES = ("-", "--", ":", "-.")


def draw(path: Path, x_ID: np.ndarray, codes_IL: np.ndarray, levels: int, *, title: str, seed: int = 0) -> None:
    """Write the PNG, whole or not at all.

    Left: the first two principal components of a sample of the items; colours repeat every 20 first codes. Right: items
    per code, most frequent first; a flat line is an evenly used level.
    """
    figure = Figure(figsize=(12, 5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    plane, use = figure.subplots(1, 2)
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(len(x_ID), min(len(x_ID), POINTS), replace=False))
    centred_ND = x_ID[sample].astype(np.float64) - x_ID[sample].mean(axis=0)
    axes_D2 = np.linalg.eigh(centred_ND.T @ centred_ND)[1][:, :-3:-1]
    across_N, up_N = (centred_ND @ axes_D2).T
    plane.scatter(across_N, up_N, c=codes_IL[sample, 0] % 20, cmap="tab20", s=6, linewidths=0)
    plane.set(title="items, by first code", xlabel="principal component 1", ylabel="principal component 2")
    for level, code_I in enumerate(codes_IL[:, :levels].T):
        count_K = np.sort(np.bincount(code_I))[::-1]
        use.plot(count_K, LINES[level % len(LINES)], label=f"level {level + 1}")
    use.set(title="use of the codes", xlabel="code, most frequent first", ylabel="items")
    use.legend(frameon=False)
    figure.suptitle(title, fontweight="bold")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})
