"""Plots of a report as inline SVG: no pixels, no files, no fonts of their own, readable on a light or dark page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tawin_nemo.eval.run_files import Series

#: Stands for "the page's text colour" until the SVG is written; matplotlib does not know currentColor.
_INK = "#010203"
#: Mid-tones that keep their contrast on white and on near-black (after Okabe and Ito).
COLOURS = ("#3d84c6", "#d9772b", "#2f9e77", "#b765b0", "#9a8a2e", "#7f7f7f")
#: Longer curves are drawn as the means of this many bins over a pale band from their minimum to their maximum.
BINS = 60

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


def curves(title: str, lines: dict[str, Series], *, ylabel: str = "") -> str:
    """Scalars over optimizer steps in one plot, a legend when there are several. Returns an SVG element."""
    with _figure(width=3.7, height=2.4) as figure:
        axes = figure.add_subplot()
        for colour, (name, series) in zip(_colours(), lines.items(), strict=False):
            _draw(axes, series, name, colour)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        if len(lines) > 1:
            axes.legend(fontsize=8.5)
        return to_svg(figure, title)


def window_profile(weights: Sequence[float], *, anchor: float, label: str) -> str:
    """Weight of each negative by its rank, beside GRPO's constant 1. Returns an SVG element."""
    with _figure(width=5.2, height=2.7) as figure:
        axes = figure.add_subplot()
        axes.bar(range(len(weights)), weights, color=COLOURS[0], width=0.72, label=label)
        axes.axhline(1.0, color=COLOURS[1], linewidth=1.2, linestyle="--", label="plain GRPO")
        axes.axvline(anchor, color=_INK, linewidth=0.8, linestyle=":", label=f"anchor, rank {anchor:g}")
        axes.set_xlabel("rank of the negative (0 = best score)")
        axes.set_ylabel("weight ω")
        axes.set_title("TAWin window")
        axes.legend(fontsize=8.5)
        return to_svg(figure, "TAWin window")


def metric_bars(metrics: Sequence[str], rows: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """(mean, low, high) of each metric and row as dots with 95 % intervals. Returns an SVG element."""
    with _figure(width=8.8, height=2.9) as figure:
        axes = figure.add_subplot()
        spread = 0.62
        for i, (colour, (name, values)) in enumerate(zip(_colours(), rows.items(), strict=False)):
            offset = spread * ((i + 0.5) / len(rows) - 0.5)
            means, lows, highs = (np.array(column) for column in zip(*values, strict=True))
            positions = np.arange(len(metrics)) + offset
            axes.errorbar(
                positions, means, yerr=(means - lows, highs - means), fmt="o", markersize=4, capsize=2.5,
                linewidth=1.2, color=colour, label=name,
            )  # fmt: skip
        axes.set_xticks(range(len(metrics)), metrics)
        axes.set_ylim(bottom=0)
        axes.set_title("Test metrics with 95 % intervals")
        axes.legend(fontsize=8.5, ncols=max(1, len(rows)))
        return to_svg(figure, "Test metrics")


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element without prolog, metadata, namespaces or fixed colours of text."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    # The hash salt makes the ids inside depend on the title only: equal runs give equal reports.
    with mpl.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = svg.replace(_INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _colours() -> Iterator[str]:
    while True:
        yield from COLOURS


def _draw(axes: Axes, series: Series, name: str, colour: str) -> None:
    if len(series) <= BINS:
        marker = "o" if len(series) <= 25 else ""
        axes.plot(series.steps, series.values, marker=marker, markersize=3.5, color=colour, label=name)
        return
    steps = [part.mean() for part in np.array_split(series.steps, BINS)]
    parts = np.array_split(series.values, BINS)
    axes.fill_between(steps, [p.min() for p in parts], [p.max() for p in parts], color=colour, alpha=0.22, linewidth=0)
    axes.plot(steps, [part.mean() for part in parts], color=colour, label=name)
