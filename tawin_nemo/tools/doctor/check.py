"""Checks: each is a small function that looks at one thing and returns a frozen `Check`; and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import wraps
from typing import ParamSpec

from tawin_nemo.util.errors import TawinError

P = ParamSpec("P")


class Status(StrEnum):
    OK = "ok"
    WARNING = "warning"  # runs, but slower or with a risk that the remedy takes away
    FAILS = "fails"  # does not run until the remedy is carried out
    ABSENT = "not here"  # nothing to look at, and nothing that is needed


@dataclass(frozen=True)
class Check:
    """One line of the table. ``remedy`` is what to do about a warning or a failure."""

    name: str
    status: Status
    value: str
    remedy: str = ""


def ok(value: str) -> Check:
    return Check("", Status.OK, value)


def warning(value: str, remedy: str) -> Check:
    return Check("", Status.WARNING, value, remedy)


def fails(value: str, remedy: str) -> Check:
    return Check("", Status.FAILS, value, remedy)


def absent(value: str, remedy: str = "") -> Check:
    return Check("", Status.ABSENT, value, remedy)


def check(name: str) -> Callable[[Callable[P, Check]], Callable[P, Check]]:
    """Give a function's result this name, and turn whatever it raises into a failing `Check`.

    The messages of this package's own errors already say what to do, so they become the remedy.
    """

    def decorate(look: Callable[P, Check]) -> Callable[P, Check]:
        @wraps(look)
        def safe(*args: P.args, **kwargs: P.kwargs) -> Check:
            try:
                found = look(*args, **kwargs)
            except TawinError as error:
                found = fails("cannot be used", str(error))
            except ModuleNotFoundError as error:
                found = fails(f"the package {error.name} is not installed", "pip install -r requirements.txt")
            except Exception as error:
                found = fails(
                    f"the check itself broke: {type(error).__name__}: {error}",
                    "look at this by hand and report the line; the other checks hold",
                )
            return replace(found, name=name)

        return safe

    return decorate


def gib(count: float) -> str:
    """Bytes for people, in GiB (MiB below one)."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def lines(checks: Sequence[Check]) -> Iterator[str]:
    """One line per check, with its remedy below it."""
    names = max(len(item.name) for item in checks)
    states = max(len(state) for state in Status)
    for item in checks:
        yield f"{item.status:<{states}}  {item.name:<{names}}  {item.value}".rstrip()
        if item.remedy:
            yield f"{'':<{states}}  {'':<{names}}  -> {item.remedy}"


def summary(checks: Sequence[Check]) -> str:
    counts = {state: sum(item.status == state for item in checks) for state in Status}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
