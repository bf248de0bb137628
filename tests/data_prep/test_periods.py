from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tawin_nemo.data_prep.raw import period
from tawin_nemo.util.errors import ConfigError


def at(*date: int) -> int:
    return int(datetime(*date, tzinfo=UTC).timestamp())


def test_published_windows_include_their_last_month() -> None:
    window = period("Office_Products_5")
    assert (window.first, window.stop) == (at(2016, 10, 1), at(2018, 12, 1))
    window = period("Yelp")
    assert (window.first, window.stop) == (at(2021, 1, 1), at(2022, 1, 1))
    assert period("Industrial_and_Scientific").first == at(1996, 10, 1)


def test_given_limits_win_and_unknown_names_are_open() -> None:
    window = period("Office_Products", "2017-02-03", "2017-02-03")
    assert (window.first, window.stop) == (at(2017, 2, 3), at(2017, 2, 4))
    assert (period("Books").first, period("Books").stop) == (None, None)


@pytest.mark.parametrize("text", ["2017", "2017-13", "2017-02-30", "yesterday", "2017-1-1"])
def test_other_formats_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.end.*YYYY-MM"):
        period("x", "", text)


def test_reversed_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="before"):
        period("x", "2018-01", "2017-12")
