"""Console logging and progress bars: rank 0 speaks, the others only warn."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def rank() -> int:
    """Global rank as the launcher (torchrun or srun) says it; 0 in a single process."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def get_logger(name: str) -> logging.Logger:
    """A logger below ``tawin_nemo``; the handler (stderr, so that stdout stays machine-readable) is set once."""
    root = logging.getLogger("tawin_nemo")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
        root.propagate = False
    return logging.getLogger(name if name.startswith("tawin_nemo") else f"tawin_nemo.{name}")


def progress(items: Iterable[T], *, what: str, total: int | None = None, initial: int = 0) -> Iterator[T]:
    """Iterate with a bar and an ETA on rank 0; on a file instead of a terminal it prints a line every 10 s."""
    terminal = sys.stderr.isatty()
    yield from tqdm(
        items,
        desc=what,
        total=total,
        initial=initial,
        disable=rank() != 0,
        mininterval=0.2 if terminal else 10.0,
        maxinterval=1.0 if terminal else 30.0,
        dynamic_ncols=terminal,
        file=sys.stderr,
    )


def say(message: str, **fields: Any) -> None:
    """One line to the person at the terminal, with ``key=value`` fields at its end."""
    tail = " ".join(f"{key}={value}" for key, value in fields.items())
    get_logger("tawin_nemo").info("%s%s", message, f" {tail}" if tail else "")
