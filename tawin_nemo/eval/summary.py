"""The results as a table for the terminal, with intervals and paired differences beside every claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tawin_nemo.eval.result import EvalResult, compare

#: Rows that RL is compared with, as far as the run has them.
BASELINES = ("sft", "sft_continued", "sft_all")


def headline_metrics(ks: Sequence[int]) -> list[str]:
    """Recall at the two smallest cut-offs and NDCG at the second: what the papers print."""
    first = sorted(ks)[:2]
    return [*(f"recall@{k}" for k in first), f"ndcg@{first[-1]}"]


def results_table(results: Mapping[str, EvalResult], ks: Sequence[int], split: str = "test") -> str:
    """One line per stage (mean and 95 % interval on ``split``), then RL minus each baseline (paired bootstrap)."""
    metrics = headline_metrics(ks)
    lines = [f"{split:24}" + "".join(f"{name:>28}" for name in metrics)]
    for stage, result in results.items():
        cells = (f"{result.means[m]:.4f} [{result.intervals[m][0]:.4f}, {result.intervals[m][1]:.4f}]" for m in metrics)
        lines.append(f"{stage:24}" + "".join(f"{cell:>28}" for cell in cells))
    if "rl" in results:
        lines += [_difference(results, baseline, metrics) for baseline in BASELINES if baseline in results]
    return "\n".join(lines)


def _difference(results: Mapping[str, EvalResult], baseline: str, metrics: Sequence[str]) -> str:
    cells = []
    for metric in metrics:
        found = compare(results["rl"], results[baseline], metric).difference
        cells.append(f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]")
    return f"{f'rl - {baseline} (paired)':24}" + "".join(f"{cell:>28}" for cell in cells)
