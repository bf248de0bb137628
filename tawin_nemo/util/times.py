"""Dates and durations as recipes write them."""

from __future__ import annotations

import calendar
import re
from datetime import UTC, date, datetime

_DATE = re.compile(r"(\d{4})-(\d{2})(?:-(\d{2}))?")
_DURATION = re.compile(r"(\d+):(\d{1,2}):(\d{1,2}):(\d{1,2})")


def duration(text: str) -> int | None:
    """Seconds of ``DD:HH:MM:SS``; None for an empty text. Raises ValueError (what is wrong, after "KEY=VALUE")."""
    if not text:
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("is not DD:HH:MM:SS, for example 00:03:50:00")
    days, hours, minutes, seconds = (int(part) for part in match.groups())
    if hours > 23 or minutes > 59 or seconds > 59:
        raise ValueError("has more than 23 hours, 59 minutes or 59 seconds; write DD:HH:MM:SS, for example 00:03:50:00")
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def first_second(text: str) -> int | None:
    """UTC seconds when the day YYYY-MM-DD or month YYYY-MM begins; None for an empty text. Raises ValueError."""
    return int(_moment(text).timestamp()) if text else None


def last_second(text: str) -> int | None:
    """UTC seconds of the moment when the day YYYY-MM-DD or month YYYY-MM is over; None for an empty text.

    Raises ValueError for a text that is no date.
    """
    if not text:
        return None
    moment = _moment(text)
    days = 1 if text.count("-") == 2 else calendar.monthrange(moment.year, moment.month)[1]
    return int(moment.timestamp()) + days * 86_400


def day(text: str) -> str:
    """The day YYYY-MM-DD; today (UTC) for an empty text. Raises ValueError for anything else."""
    if not text:
        return datetime.now(tz=UTC).date().isoformat()
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError("is not a date; write YYYY-MM-DD, or leave it empty for today") from None


def _moment(text: str) -> datetime:
    match = _DATE.fullmatch(text)
    try:
        if match is None:
            raise ValueError("another format")
        return datetime(int(match[1]), int(match[2]), int(match[3] or 1), tzinfo=UTC)
    except ValueError:
        raise ValueError("is not a date; write YYYY-MM-DD or YYYY-MM") from None
