"""Progress on a file: whole lines with count, total and time to go."""

import logging

import pytest

from tawin_nemo.run.stage import Progress, soonest_stop
from tawin_nemo.util import log


@pytest.mark.parametrize(("items", "total", "expected"), [([1, 2, 3], None, "1/3 ["), (iter([1, 2, 3]), 3, "1/3 [")])
def test_lines_count_up_to_the_total(monkeypatch, items, total, expected):
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    log.get_logger("tawin_nemo").addHandler(handler)
    try:
        assert list(log.progress(items, what="rl", total=total)) == [1, 2, 3]
    finally:
        log.get_logger("tawin_nemo").removeHandler(handler)
    assert len(lines) == 3
    assert lines[0].startswith(f"rl {expected}")
    assert "to go" in lines[0]


def test_the_time_to_go_counts_to_the_soonest_end(monkeypatch, caplog):
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    ends = iter([2, 2, 4, 6])
    with caplog.at_level(logging.INFO, logger="tawin_nemo"):
        assert list(log.progress(range(4), what="sft", total=6, soonest=lambda: next(ends))) == [0, 1, 2, 3]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" [")[0] for line in lines] == ["sft 1/2", "sft 2/2", "sft 3/4", "sft 4/6"]
    assert ["at the soonest; at most 6" in line for line in lines] == [True, True, True, False]


def test_early_stopping_can_end_after_the_remaining_checks():
    assert soonest_stop(Progress(step=0), patience=3, check_every=10) == 30
    assert soonest_stop(Progress(step=25, bad_checks=1), patience=3, check_every=10) == 40
    assert soonest_stop(Progress(step=30, bad_checks=3), patience=3, check_every=10) == 30


def test_a_line_counts_in_the_units_of_the_items(monkeypatch, caplog):
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO, logger="tawin_nemo"):
        assert list(log.progress([512, 100], what="recommend", size=lambda rows: rows, unit="rows")) == [512, 100]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" [")[0] for line in lines] == ["recommend 512/612", "recommend 612/612"]
    assert all("rows/s]" in line or "?rows/s" in line for line in lines)
