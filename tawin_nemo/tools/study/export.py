"""The tables of a study for other programs and for papers: CSV files, and LaTeX tables in booktabs' style."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from tawin_nemo.eval.intervals import Interval
from tawin_nemo.tools.study.analysis import PairRow, Results, pair_rows
from tawin_nemo.tools.study.tables import plain, short, signed
from tawin_nemo.util.files import atomic_path

_SPECIAL = {char: f"\\{char}" for char in "&%$#_{}"}
_SPECIAL |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
_Pairs = dict[str, list[PairRow]]


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Write ``arms.csv``, ``pairs.csv`` and, for each split, ``arms.SPLIT.tex`` and ``pairs.SPLIT.tex`` to ``folder``.

    A CSV line is one arm (or pair), split and metric. Without a pair that has two finished runs there are no files of
    pairs.
    """
    metrics = results.study.file.metrics
    pairs = {
        split: [row for metric in metrics for row in pair_rows(results, split, metric)] for split in results.splits
    }
    pairs = {split: rows for split, rows in pairs.items() if rows}
    written = [_csv(arm_lines(results), folder / "arms.csv")]
    texts = {f"arms.{split}.tex": arms_latex(results, split) for split in results.splits}
    if pairs:
        written.append(_csv(pair_lines(pairs), folder / "pairs.csv"))
        texts |= {f"pairs.{split}.tex": pairs_latex(results, rows) for split, rows in pairs.items()}
    for name, text in texts.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(folder / name)
    return written


def arm_lines(results: Results) -> pl.DataFrame:
    """One line per arm, split and metric: mean over seeds and users, and the limits of its 95 % interval."""
    lines = []
    for split in results.splits:
        for arm in results.study.arms:
            for metric in results.study.file.metrics:
                mean = results.mean(arm.name, split, metric)
                if mean is not None:
                    seeds = len(results.evaluated(arm.name, split))
                    lines.append((arm.name, split, metric, seeds, mean.mean, mean.low, mean.high))
    return pl.DataFrame(lines, schema=["arm", "split", "metric", "seeds", "mean", "low", "high"], orient="row")


def pair_lines(pairs: _Pairs) -> pl.DataFrame:
    """One line per comparison, split and metric: difference with 95 % limits, p, Holm's p, what was detectable."""
    lines = []
    for split, rows in pairs.items():
        for row in rows:
            limits = (row.test.difference.mean, row.test.difference.low, row.test.difference.high)
            names = (row.ours, row.theirs, split, row.metric)
            lines.append((*names, *limits, row.test.p, row.p_holm, row.test.detectable))
    columns = ["ours", "theirs", "split", "metric", "difference", "low", "high", "p", "p_holm", "detectable"]
    return pl.DataFrame(lines, schema=columns, orient="row")


def arms_latex(results: Results, split: str) -> str:
    """Arms x metrics: means with their intervals in small print; the best mean of a column is bold."""
    metrics, names = results.study.file.metrics, [arm.name for arm in results.study.arms]
    columns = [[results.mean(name, split, metric) for name in names] for metric in metrics]
    best = [max((mean.mean for mean in column if mean is not None), default=None) for column in columns]
    body = [
        [escaped(name), *(_mean_cell(mean, top) for mean, top in zip(means, best, strict=True))]
        for name, *means in zip(names, *columns, strict=True)
        if any(mean is not None for mean in means)
    ]
    return _tabular(["arm", *(escaped(short(metric)) for metric in metrics)], body)


def pairs_latex(results: Results, rows: Sequence[PairRow]) -> str:
    """Comparisons x metrics: differences with their intervals; bold where the interval excludes zero."""
    metrics = results.study.file.metrics
    cells = {(row.ours, row.theirs, row.metric): _difference_cell(row.test.difference) for row in rows}
    body = [
        [f"{escaped(ours)} $-$ {escaped(theirs)}", *(cells.get((ours, theirs, metric), "--") for metric in metrics)]
        for ours, theirs in dict.fromkeys((row.ours, row.theirs) for row in rows)
    ]
    return _tabular(["difference", *(escaped(short(metric)) for metric in metrics)], body)


def escaped(text: str) -> str:
    """
    >>> escaped("hit_ratio@1 50%")
    'hit\\\\_ratio@1 50\\\\%'
    """
    return "".join(_SPECIAL.get(char, char) for char in text)


def _mean_cell(mean: Interval | None, best: float | None) -> str:
    if mean is None:
        return "--"
    text = plain(mean.mean)
    shown = f"\\textbf{{{text}}}" if mean.mean == best else text
    return f"{shown} {{\\small [{plain(mean.low)}, {plain(mean.high)}]}}"


def _difference_cell(difference: Interval) -> str:
    text = signed(difference.mean)
    shown = f"\\textbf{{{text}}}" if difference.excludes_zero else text
    return f"{shown} {{\\small [{signed(difference.low)}, {signed(difference.high)}]}}"


def _tabular(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [" & ".join(cells) + r" \\" for cells in (head, *body)]
    return "\n".join([
        "% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", lines[0],
        r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", "",
    ])  # fmt: skip


def _csv(table: pl.DataFrame, path: Path) -> Path:
    with atomic_path(path) as temporary:
        table.write_csv(temporary)
    return path
