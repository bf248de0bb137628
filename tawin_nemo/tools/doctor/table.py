"""The table that people read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tawin_nemo.tools.doctor.check import Check, Status


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
