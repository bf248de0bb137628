"""Dates and durations of recipes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tawin_nemo.util import times


def test_durations_are_seconds() -> None:
    assert times.duration("") is None
    assert times.duration("01:02:03:04") == 93_784
    assert times.duration("1:00:00:00") == 86_400
    for wrong in ("1:00", "60", "0:24:00:00", "0:00:60:00", "00:-1:00:00", "00:00:00:00:00"):
        with pytest.raises(ValueError, match="DD:HH:MM:SS"):
            times.duration(wrong)


def test_days_and_months_begin_and_end() -> None:
    def at(*date: int) -> int:
        return int(datetime(*date, tzinfo=UTC).timestamp())

    assert times.first_second("") is times.last_second("") is None
    assert (times.first_second("2018-02"), times.last_second("2018-02")) == (at(2018, 2, 1), at(2018, 3, 1))
    assert (times.first_second("2018-12-31"), times.last_second("2018-12-31")) == (at(2018, 12, 31), at(2019, 1, 1))
    for wrong in ("2018", "2018-13", "2018-02-30", "18-02-01", "2018/02/01"):
        for read in (times.first_second, times.last_second):
            with pytest.raises(ValueError, match="is not a date"):
                read(wrong)


def test_a_day_is_a_day_and_nothing_else() -> None:
    assert times.day("2018-02-28") == "2018-02-28"
    assert len(times.day("")) == 10
    for wrong in ("2018-2-28", "28.02.2018", "yesterday", "2018-02"):
        with pytest.raises(ValueError, match="is not a date"):
            times.day(wrong)
