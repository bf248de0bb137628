"""Console logging and progress bars: rank 0 logs from level INFO, the others from WARNING."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
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


def progress(items: Iterable[T], *, what: str, total: int | None = None, initial: int = 0) -> Iterator[T]:
    """Iterate over ``items`` with a progress bar and an ETA on rank 0.

    Where stderr is a file (Slurm, nohup) it logs a line every SECONDS_BETWEEN_LINES seconds instead. ``initial``: items
    that were done before, of ``total``.
    """
    if sys.stderr.isatty():
        quiet = read_launch().rank != 0
        yield from tqdm(items, desc=what, total=total, initial=initial, disable=quiet, dynamic_ncols=True)
        return
    if total is None and isinstance(items, Sized):
        total = initial + len(items)
    start = last = time.monotonic()
    for count, item in enumerate(items, initial + 1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            meter = tqdm.format_meter(count, total, now - start, initial=initial, bar_format=_LINE)
            get_logger(__name__).info("%s %s", what, meter)


def say(message: str, **fields: Any) -> None:
    """Log one line at level INFO, with ``key=value`` fields at its end."""
    tail = " ".join(f"{key}={value}" for key, value in fields.items())
    get_logger("tawin_nemo").info("%s%s", message, f" {tail}" if tail else "")
