"""The picture of ``simulate``: a heat map for each K, and the maximisers against K beside the theorem's line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tawin_nemo.tools.simulate.simulate import Peak
from tawin_nemo.util.files import atomic_path

COLUMNS = 3
#: Lines of equal correlation, also drawn on the colour bar.
LEVELS = (0.5, 0.7, 0.9)
#: Even steps of lightness, readable with every kind of colour blindness and in grey.
MAP = "cividis"
#: Shape, not only colour, tells the marks apart.
RED = "#d7263d"
BEST: dict[str, Any] = {"marker": "*", "s": 190, "color": RED, "edgecolors": "white", "linewidths": 0.9, "zorder": 5}
THEOREM: dict[str, Any] = {
    "marker": "D",
    "s": 42,
    "color": "black",
    "edgecolors": "white",
    "linewidths": 0.9,
    "zorder": 4,
}
THEOREM_LINE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.1, "zorder": 3}
WIDTHS = {0.005: "0.005", 0.01: "0.01", 0.02: "0.02", 0.05: "0.05", 0.1: "0.1", 0.2: "0.2", 0.5: "0.5", 1.0: "1"}
_STYLE = {"font.size": 10, "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False}


def draw(
    path: Path, maps_KSE: np.ndarray, rows: Mapping[str, Mapping[str, Any]], curve: Mapping[int, Peak], *, title: str
) -> None:
    """Write the PNG.

    Args:
        path: The file; it is whole or not there.
        maps_KSE: Correlations by start and end of the window, as ``simulate.correlations`` returns them.
        rows: One row per map, as ``simulate.summarise`` returns them, keyed by K.
        curve: The exact maximiser at many K.
        title: Headline over everything.
    """
    with mpl.rc_context(_STYLE):
        lines = math.ceil((len(rows) + 1) / COLUMNS)
        figure = Figure(figsize=(4.5 * COLUMNS, 3.6 * lines + 0.4), layout="constrained", dpi=130)
        FigureCanvasAgg(figure)
        panels: list[Axes] = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
        image, contours = [_heat_map(*row) for row in zip(panels, maps_KSE, rows.items(), strict=False)][-1]
        _maximisers(panels[len(rows)], rows, curve)
        for panel in panels[len(rows) + 1 :]:
            panel.set_axis_off()
        bar = figure.colorbar(image, ax=panels, label="Pearson correlation of WPAUC(α, d) with Recall@K", aspect=35)
        bar.add_lines(contours)
        figure.suptitle(title, fontweight="bold")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
        with atomic_path(path) as temporary:
            figure.savefig(temporary, metadata={"Software": None})


def _heat_map(axes: Axes, map_SE: np.ndarray, item: tuple[str, Mapping[str, Any]]) -> tuple[Any, Any]:
    """Window start against window width; the width is logarithmic, because the best windows are narrow."""
    k, row = item
    n = len(map_SE) - 1
    by_width = np.full((n, n), np.nan)
    for width in range(1, n + 1):
        by_width[width - 1, : n + 1 - width] = map_SE.diagonal(width)
    alpha, d = np.arange(n) / n, np.arange(1, n + 1) / n
    edges_x = (np.arange(n + 1) - 0.5) / n
    edges_y = np.sqrt(np.arange(n + 1).clip(min=0.5) * np.arange(1, n + 2)) / n
    image = axes.pcolormesh(edges_x, edges_y, by_width, cmap=MAP, vmin=0, vmax=1, rasterized=True)
    contours = axes.contour(alpha, d, by_width, levels=LEVELS, colors="black", linewidths=0.7, alpha=0.7)
    axes.axvline(row["predicted_alpha"], **THEOREM_LINE)
    axes.scatter(row["predicted_alpha"], row["predicted_d"], clip_on=False, **THEOREM)
    axes.scatter(row["argmax_alpha"], row["argmax_d"], clip_on=False, **BEST)
    axes.set_yscale("log")
    axes.set_ylim(edges_y[0], edges_y[-1])
    axes.set_xlim(edges_x[0], 1)
    axes.set_yticks(list(WIDTHS), labels=list(WIDTHS.values()))
    axes.minorticks_off()
    axes.set_xlabel("window start α")
    axes.set_ylabel("window width d (log scale)")
    best = f"α = {row['argmax_alpha']:.3f}, d = {row['argmax_d']:.3f}, r = {row['correlation']:.3f}"
    axes.set_title(f"Recall@{k}: best {best}", loc="left")
    return image, contours


def _maximisers(axes: Axes, rows: Mapping[str, Mapping[str, Any]], curve: Mapping[int, Peak]) -> None:
    cutoffs = [int(k) for k in rows]
    predicted = [row["predicted_alpha"] for row in rows.values()]
    simulated = [row["argmax_alpha"] for row in rows.values()]
    axes.scatter(cutoffs, simulated, label="best window, simulated", **BEST)
    axes.plot(list(curve), [peak.alpha for peak in curve.values()], color=RED, label="best window, exact")
    axes.scatter(cutoffs, predicted, label="Theorem 3.4: α = (K − n₊)/n₋", **THEOREM)
    axes.axline((cutoffs[0], predicted[0]), (cutoffs[-1], predicted[-1]), **THEOREM_LINE)
    axes.set_xlabel("K")
    axes.set_ylabel("window start α")
    axes.set_xlim(0, max(curve) * 1.02)
    axes.set_ylim(-0.03, 1)
    axes.grid(alpha=0.15)
    axes.legend(fontsize=9, frameon=False, loc="upper left")
    axes.set_title("The best window moves right as K grows", loc="left")
