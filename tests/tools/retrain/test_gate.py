"""The gate's arithmetic: paired differences of per-user tables made by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.eval.intervals import normal_interval
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.tools.retrain.gate import Check, Decision, decide
from tawin_nemo.tools.retrain.judge import gated_metrics
from tawin_nemo.util.errors import DataError

METRICS = ("recall@3", "ndcg@3")


def result(recall: list[float], *, invalid_rate: float = 0.0) -> EvalResult:
    """An evaluation whose rows have these recalls, and half of them as NDCG."""
    values = {"recall@3": np.array(recall), "ndcg@3": np.array(recall) / 2}
    rows = np.arange(len(recall))
    intervals = {name: normal_interval(column) for name, column in values.items()}
    return EvalResult(
        means={name: float(column.mean()) for name, column in values.items()},
        intervals={name: (found.low, found.high) for name, found in intervals.items()},
        rows=len(recall), invalid_rate=invalid_rate, collisions=0, short_rows=0.0, coverage=0.0, beams=3,
        collision="fractional", per_user=pl.DataFrame({"row": rows, "user": rows, "target": rows, **values}),
    )  # fmt: skip


def judged(ours: EvalResult, theirs: EvalResult | None, *, margin: float = 0.05) -> Decision:
    return decide(ours, theirs, METRICS, date="2018-06-30", against="2018-03-31" if theirs else "", margin=margin)


HALF = [1.0, 0.0] * 50


def test_the_first_candidate_passes_unless_its_answers_are_invalid():
    assert judged(result(HALF), None).passed
    broken = judged(result(HALF, invalid_rate=0.25), None)
    assert not broken.passed
    assert broken.reasons == ["25.00% of the answers are no catalog items"]


def test_an_equal_model_passes_even_without_a_margin():
    decision = judged(result(HALF), result(HALF), margin=0.0)
    assert decision.passed
    assert (decision.verdicts[0].difference.low, decision.verdicts[0].difference.high) == (0.0, 0.0)


def test_a_worse_model_is_refused_and_told_why():
    """10 of 100 users lost: -0.1 on average, sure to be below -5 % of 0.5."""
    worse = [0.0] * 20 + HALF[20:]
    decision = judged(result(worse), result(HALF))
    assert not decision.passed
    verdict = decision.verdicts[0]
    assert verdict.difference.mean == pytest.approx(-0.1)
    assert verdict.lowest_allowed == pytest.approx(-0.05 * 0.5)
    assert verdict.difference.low < verdict.lowest_allowed
    assert [reason.split(":")[0] for reason in decision.reasons] == list(METRICS)
    assert "0.4000 against 0.5000 of 2018-03-31, difference -0.1000 [" in decision.reasons[0]


def test_the_margin_is_a_share_of_the_published_value():
    """One user of 100 lost: the interval reaches down to -0.03 at most, 6 % of 0.5."""
    slightly = result([0.0, *HALF[1:]])
    assert not judged(slightly, result(HALF), margin=0.01).passed
    assert judged(slightly, result(HALF), margin=0.10).passed


def test_too_few_rows_to_tell_keep_the_published_model():
    """Better on average, but one lost user in four makes the interval wide."""
    assert not judged(result([1.0, 1.0, 0.0, 1.0]), result([0.0, 1.0, 1.0, 0.0])).passed


def test_one_failing_metric_is_enough():
    ours = result(HALF)
    table = ours.per_user.with_columns(pl.lit(0.0).alias("ndcg@3"))
    ours = EvalResult(**{**vars(ours), "means": {**ours.means, "ndcg@3": 0.0}, "per_user": table})
    decision = judged(ours, result(HALF))
    assert [verdict.passed for verdict in decision.verdicts] == [True, False]
    assert not decision.passed


def test_other_rows_cannot_be_compared():
    with pytest.raises(DataError, match="same rows"):
        judged(result(HALF), result(HALF[:50]))


def test_a_model_that_loses_the_tail_is_refused():
    """The first places as before, but fewer targets within the first 50."""
    ours, theirs = result(HALF), result(HALF)
    for one, recall in ((ours, [0.0] * 20 + HALF[20:]), (theirs, HALF)):
        table = one.per_user.with_columns(pl.Series("recall@50", recall))
        one.means["recall@50"] = float(np.mean(recall))
        found = normal_interval(np.array(recall))
        one.intervals["recall@50"] = (found.low, found.high)
        object.__setattr__(one, "per_user", table)
    metrics = gated_metrics(load_recipe(None, ["retrain.metrics=[ndcg@3]", "eval.ks=[1,3]"]))
    assert metrics == ["ndcg@3", "recall@50"]
    decision = decide(ours, theirs, metrics, date="2018-06-30", against="2018-03-31", margin=0.05)
    assert [(one.metric, one.passed) for one in decision.verdicts] == [("ndcg@3", True), ("recall@50", False)]
    assert not decision.passed
    assert decision.reasons[0].startswith("recall@50: 0.4000 against 0.5000")


def test_the_tail_is_that_of_the_lists():
    few = ["retrain.metrics=[recall@3]", "eval.ks=[1,3]", "eval.beams=6"]
    assert gated_metrics(load_recipe(None, few)) == ["recall@3", "recall@6"]
    assert gated_metrics(load_recipe(None, [*few, "retrain.tail_k=3"])) == ["recall@3"]
    assert gated_metrics(load_recipe(None, [*few, "retrain.tail_k=0"])) == ["recall@3"]


@pytest.mark.parametrize(
    ("check", "passed"),
    [
        (Check("coverage@10", 0.2, 0.2), True),
        (Check("coverage@10", 0.19, 0.2), False),
        (Check("coverage@10", 0.0, 0.0), True),  # 0: not asked for
        (Check("latency_ms", 20.0, 20.0, at_most=True), True),
        (Check("latency_ms", 20.1, 20.0, at_most=True), False),
        (Check("latency_ms", None, 0.0, at_most=True), True),  # not measured
    ],
)
def test_coverage_and_latency_have_limits_of_their_own(check, passed):
    decision = decide(
        result(HALF), result(HALF), METRICS, date="2018-06-30", against="2018-03-31", margin=0.05, checks=[check]
    )
    assert (check.passed, decision.passed) == (passed, passed)
    assert decision.reasons == ([] if passed else [check.reason])
