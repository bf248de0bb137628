"""PNG plots of a study from its run files: sweeps with 95 % intervals, and curves over training steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tawin_nemo.eval.figures import COLOURS
from tawin_nemo.tools.study.analysis import Results, sweep_lines
from tawin_nemo.tools.study.arms import matching
from tawin_nemo.tools.study.config import Sweep
from tawin_nemo.tools.study.tables import short
from tawin_nemo.util.files import atomic_path

_STYLE = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True, "axes.grid.axis": "y",
    "grid.alpha": 0.25, "axes.linewidth": 0.6, "lines.linewidth": 1.6, "legend.frameon": False, "legend.fontsize": 8.5,
}  # fmt: skip
#: Panels beside each other.
COLUMNS = 3
_MARKERS = "os^Dv"


def write_plots(results: Results, folder: Path) -> list[str]:
    """Write every plot that has something to show; returns the file names in the order of the page."""
    plots = dict(_plots(results))
    for name, draw in plots.items():
        draw(folder / name)
    return list(plots)


def plot_names(results: Results) -> list[str]:
    """The file names that ``write_plots`` would write."""
    return [name for name, _ in _plots(results)]


def _plots(results: Results) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for split in results.splits:
        for sweep in results.study.file.sweeps:
            arms = [arm.name for arm in results.study.arms if arm.base == sweep.arm]
            theirs = results.evaluated(sweep.minus, split) if sweep.minus else None
            if any(theirs is None or seed in theirs for arm in arms for seed in results.evaluated(arm, split)):
                label = f"{sweep.arm}-{sweep.minus}" if sweep.minus else sweep.arm
                yield _file_name("sweep", label, sweep.x_label, split), partial(_sweep, results, sweep, split)
    for key in results.study.file.curves:
        curves = {arm.name: seeds for arm in results.study.arms if (seeds := results.curve(arm.name, key))}
        if curves:
            yield _file_name("curve", key), partial(_curves, curves, key)


def _file_name(*words: str) -> str:
    """
    >>> _file_name("curve", "valid/recall@3")
    'curve.valid_recall_3.png'
    """
    return ".".join(re.sub(r"[^A-Za-z0-9_=,+-]+", "_", word) for word in words) + ".png"


def _sweep(results: Results, sweep: Sweep, split: str, path: Path) -> None:
    """One panel per metric: a line per choice of the other grid keys, the arms beside it as level lines."""
    metrics = sweep.metrics or results.study.file.metrics
    lines = {metric: sweep_lines(results, sweep, split, metric) for metric in metrics}
    with _panels(len(metrics)) as (figure, panels):
        for axes, metric in zip(panels, metrics, strict=True):
            width = max((max(line.x) - min(line.x) for line in lines[metric]), default=1.0)
            for number, line in enumerate(lines[metric]):
                means = np.array([interval.mean for interval in line.means])
                low = np.maximum(means - [interval.low for interval in line.means], 0.0)
                high = np.maximum([interval.high for interval in line.means] - means, 0.0)
                shift = 0.012 * width * (number - (len(lines[metric]) - 1) / 2)  # intervals beside, not over each other
                axes.errorbar(
                    np.array(line.x) + shift, means, yerr=(low, high), marker=_MARKERS[number % len(_MARKERS)],
                    markersize=4, capsize=2.5, elinewidth=1.0, color=COLOURS[number % len(COLOURS)], label=line.label,
                )  # fmt: skip
            if sweep.minus:
                axes.axhline(0.0, color="0.3", linewidth=1.1, linestyle="--", label=sweep.minus)
            else:
                names = [arm.name for arm in results.study.arms]
                beside = [name for pattern in sweep.beside for name in matching(pattern, names)]
                _level_lines(axes, results, beside, split, metric, len(lines[metric]))
            axes.set_title(f"{short(metric)}, {split}")
            axes.set_xlabel(sweep.x_label)
            axes.set_xticks(sorted({x for line in lines[metric] for x in line.x}))
        _legend_below(figure, panels)
        _save(figure, path)


def _legend_below(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, outside of them: each arm once."""
    arms = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(arms.values()), list(arms), loc="outside lower center", ncols=min(4, len(arms)))


def _level_lines(axes: Axes, results: Results, names: Sequence[str], split: str, metric: str, used: int) -> None:
    for number, name in enumerate(names, start=used):
        mean = results.mean(name, split, metric)
        if mean is not None:
            colour = COLOURS[number % len(COLOURS)]
            axes.axhline(mean.mean, color=colour, linewidth=1.1, linestyle="--", label=name)
            axes.axhspan(mean.low, mean.high, color=colour, alpha=0.08, linewidth=0)


def _curves(curves: Mapping[str, Mapping[int, np.ndarray]], key: str, path: Path) -> None:
    """The mean over seeds of each arm, the single seeds pale behind it."""
    with _panels(1, width=6.4, height=3.6) as (figure, panels):
        axes = panels[0]
        for number, (name, seeds) in enumerate(curves.items()):
            colour, style = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
            for rows in seeds.values():
                axes.plot(rows[:, 0], rows[:, 1], color=colour, alpha=0.3, linewidth=0.9, linestyle=style)
            steps = sorted(set.intersection(*({float(step) for step in rows[:, 0]} for rows in seeds.values())))
            means = [np.mean([rows[rows[:, 0] == step, 1][0] for rows in seeds.values()]) for step in steps]
            axes.plot(steps, means, color=colour, linestyle=style, marker="o", markersize=3, label=name)
        axes.set_title(key)
        axes.set_xlabel("step")
        _legend_below(figure, panels)
        _save(figure, path)


@contextmanager
def _panels(count: int, width: float = 3.6, height: float = 2.9) -> Iterator[tuple[Figure, list[Axes]]]:
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        yield figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata={"Software": None})  # equal runs, equal bytes
