"""Counts of what a pretended CUDA device was asked to do, by the place in the product that asked for it.

An event belongs to the innermost function of ``tawin_nemo`` or ``data_prep`` on the stack. Events of a backward pass
belong to the function that started it, or to the product's own backward function.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import NamedTuple

#: launches: operations that start at least one kernel. syncs: the host waits for the device. h2d, d2h: copies between
#: host and device. collectives: calls of torch.distributed.
KINDS = ("launches", "syncs", "h2d", "d2h", "collectives")
_ROOT = Path(__file__).resolve().parents[2]
_PRODUCT = (f"{_ROOT}/tawin_nemo/", f"{_ROOT}/data_prep/")
#: Wrappers: what runs inside belongs to their caller.
_TRANSPARENT = ("models/megatron/parallel/first_import.py", "util/torch_modes.py")
#: Python 3.12 has no frames of its own for some of these, so that names must not depend on them.
_INNER = re.compile(r"(\.<locals>)?\.<(listcomp|setcomp|dictcomp|genexpr|lambda)>")


class Site(NamedTuple):
    """A function of the product, and the operation that it asked for."""

    path: str  # below the package: rollout/select.py
    function: str
    operation: str

    def __str__(self) -> str:
        return f"{self.path} {self.function}: {self.operation}"


class Counts:
    """Events by kind and call site."""

    def __init__(self) -> None:
        self.events: dict[str, Counter[Site]] = {kind: Counter() for kind in KINDS}
        self.lines: dict[Site, int] = {}  # the line of the last event

    def total(self, kind: str) -> int:
        """All events of a kind."""
        return sum(self.events[kind].values())

    def totals(self) -> dict[str, int]:
        """All events, by kind."""
        return {kind: self.total(kind) for kind in KINDS}

    def __sub__(self, part: Counts) -> Counts:
        rest = Counts()
        rest.lines = dict(self.lines)
        for kind in KINDS:
            rest.events[kind] = self.events[kind] - part.events[kind]
        return rest

    def __add__(self, other: Counts) -> Counts:
        both = Counts()
        both.lines = {**self.lines, **other.lines}
        for kind in KINDS:
            both.events[kind] = self.events[kind] + other.events[kind]
        return both

    def table(self, *, kinds: tuple[str, ...] = KINDS, most: int = 20) -> str:
        """The call sites with the most events of each kind, for people."""
        lines = []
        for kind in kinds:
            lines.append(f"{kind}: {self.total(kind)}")
            for site, count in self.events[kind].most_common(most):
                lines.append(f"  {count:6d}  {site} (line {self.lines.get(site, 0)})")
        return "\n".join(lines)


_open: list[Counts] = []


class _Muted(threading.local):
    depth = 0


_muted = _Muted()


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Collects the events inside the block; blocks may be nested, and the outer ones then count them as well."""
    counts = Counts()
    _open.append(counts)
    try:
        yield counts
    finally:
        _open.remove(counts)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Inside, nothing of this thread is recorded: what the pretended device does for itself."""
    _muted.depth += 1
    try:
        yield
    finally:
        _muted.depth -= 1


def record(kind: str, operation: str) -> None:
    """Add one event to every open block."""
    if not _open or _muted.depth:
        return
    site, line = _site(operation)
    for counts in _open:
        counts.events[kind][site] += 1
        counts.lines[site] = line


_places: dict[CodeType, tuple[str, str] | None] = {}


def _site(operation: str) -> tuple[Site, int]:
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code not in _places:
            _places[code] = _place(code)
        place = _places[code]
        if place is not None:
            return Site(*place, operation), frame.f_lineno
        frame = frame.f_back
    return Site("", "outside of the product", operation), 0


def _place(code: CodeType) -> tuple[str, str] | None:
    root = next((root for root in _PRODUCT if code.co_filename.startswith(root)), None)
    if root is None:
        return None
    path = code.co_filename.removeprefix(root)
    if path in _TRANSPARENT:
        return None
    return (path if root == _PRODUCT[0] else f"data_prep/{path}", _INNER.sub("", code.co_qualname))
