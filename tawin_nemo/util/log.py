"""Console logging and progress bars: rank 0 logs from level INFO, the others from WARNING."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

from tawin_nemo.util.launch import read_launch

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30.0
_LINE = "{n_fmt}/{total_fmt} [{elapsed}, {remaining} to go, {rate_fmt}]"


def get_logger(name: str) -> logging.Logger:
    """A logger below ``tawin_nemo``. Its one handler writes to stderr, so that stdout stays machine-readable."""
    root = logging.getLogger("tawin_nemo")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(logging.INFO if read_launch().rank == 0 else logging.WARNING)
        root.propagate = False
    return logging.getLogger(name if name.startswith("tawin_nemo") else f"tawin_nemo.{name}")


def progress(
    items: Iterable[T],
    *,
    what: str,
    total: int | None = None,
    initial: int = 0,
    soonest: Callable[[], int] | None = None,
    size: Callable[[T], int] = lambda item: 1,
    unit: str = "it",
) -> Iterator[T]:
    """Iterate over ``items`` with a progress bar and an ETA on rank 0.

    Where stderr is a file (Slurm, nohup) it logs a line every SECONDS_BETWEEN_LINES seconds instead. ``initial``: items
    that were done before, of ``total``. ``soonest``: the number of items after which early stopping may end the loop,
    as known now; the time to go counts to there, and the line says so. ``size``: what an item counts for,
    in ``unit``; ``total`` and ``initial`` are in this unit, too.
    """
    if total is None and isinstance(items, Sized):
        total = initial + sum(map(size, items))

    def end() -> int | None:
        return total if soonest is None or total is None else min(total, soonest())

    if sys.stderr.isatty():
        quiet = read_launch().rank != 0
        with tqdm(desc=what, total=end(), initial=initial, disable=quiet, dynamic_ncols=True, unit=unit) as bar:
            for item in items:
                yield item
                bar.total = end()
                bar.update(size(item))
        return
    start = last = time.monotonic()
    count = initial
    for item in items:
        yield item
        count += size(item)
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last, goal = now, end()
            meter = tqdm.format_meter(count, goal, now - start, initial=initial, bar_format=_LINE, unit=unit)
            limit = f" at the soonest; at most {total}" if goal != total else ""
            get_logger(__name__).info("%s %s%s", what, meter, limit)


def say(message: str, **fields: Any) -> None:
    """Log one line at level INFO, with ``key=value`` fields at its end."""
    tail = " ".join(f"{key}={value}" for key, value in fields.items())
    get_logger("tawin_nemo").info("%s%s", message, f" {tail}" if tail else "")
