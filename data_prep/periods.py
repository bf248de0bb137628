"""Time windows: the periods of the paper's data sets, and the ``prepare.start`` / ``prepare.end`` options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tawin_nemo.util import times
from tawin_nemo.util.errors import ConfigError

#: Name in a file name -> first and last month, inclusive (arXiv 2604.22504, Appendix G.1).
PUBLISHED = {
    "Toys_and_Games": ("2016-10", "2018-11"),
    "Office_Products": ("2016-10", "2018-11"),
    "Industrial_and_Scientific": ("1996-10", "2018-11"),
    "yelp": ("2021-01", "2021-12"),
    "Synthetic": ("2016-10", "2018-11"),
}


@dataclass(frozen=True)
class Period:
    """A time window in UTC seconds, ``first <= time < stop``; None is no limit."""

    start: str
    end: str
    first: int | None
    stop: int | None

    def __str__(self) -> str:
        return f"{self.start or 'the beginning'}..{self.end or 'the end'}"


def period(name: str, start: str = "", end: str = "") -> Period:
    """The window for a data set. Empty limits are the published ones if ``name`` contains a published name, else open.

    ``start`` and ``end`` are YYYY-MM-DD or YYYY-MM; a month or day as ``end`` is included whole. Raises ConfigError for
    other formats, or if the window ends before it begins.
    """
    known = next((limits for key, limits in PUBLISHED.items() if key.lower() in name.lower()), ("", ""))
    start, end = start or known[0], end or known[1]
    first = _seconds("prepare.start", start, times.first_second)
    stop = _seconds("prepare.end", end, times.last_second)
    if first is not None and stop is not None and stop <= first:
        raise ConfigError(f"prepare.end={end} lies before prepare.start={start}; exchange them")
    return Period(start, end, first, stop)


def _seconds(key: str, text: str, parse: Callable[[str], int | None]) -> int | None:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text!r} {error}") from None
