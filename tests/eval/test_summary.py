"""The terminal's table holds the numbers of the evaluations."""

import numpy as np
import polars as pl

from tawin_nemo.eval.intervals import normal_interval
from tawin_nemo.eval.result import EvalResult, headline_metrics, results_table


def evaluation(hits: list[int]) -> EvalResult:
    values = np.array(hits, dtype=float)
    names = ["recall@1", "recall@3", "ndcg@3"]
    table = pl.DataFrame({"row": range(len(hits)), "user": range(len(hits)), "target": range(len(hits))})
    table = table.with_columns(**{name: pl.Series(values) for name in names})
    interval = normal_interval(values)
    return EvalResult(
        means=dict.fromkeys(names, interval.mean),
        intervals=dict.fromkeys(names, (interval.low, interval.high)),
        rows=len(hits), invalid_rate=0.0, collisions=0, short_rows=0.0, coverage=1.0, beams=3,
        collision="fractional", per_user=table,
    )  # fmt: skip


def test_means_intervals_and_paired_differences():
    text = results_table({"sft": evaluation([0, 1, 0, 0]), "rl": evaluation([1, 1, 0, 0])}, ks=[3, 1, 10])
    sft, rl, difference = text.splitlines()[1:]
    assert sft.startswith("sft ")
    assert "0.2500 [" in sft
    assert "0.5000 [" in rl
    assert difference.startswith("rl - sft (paired)")
    assert f"{2 / 4 - 1 / 4:+.4f} [" in difference


def test_headline_is_what_the_papers_print():
    assert headline_metrics([10, 3, 1, 5]) == ["recall@1", "recall@3", "ndcg@3"]
