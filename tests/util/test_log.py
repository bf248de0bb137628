"""Progress on a file: whole lines with count, total and time to go."""

import logging

import pytest

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
