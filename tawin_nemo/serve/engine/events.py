"""The server's log: one JSON object a line on stderr, for programs that read logs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

NAME = "tawin_nemo.serve.engine.events"


class _Bare(logging.Handler):
    """Writes the message alone, to whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(record.getMessage() + "\n")
        sys.stderr.flush()


def write_event(event: str, **facts: Any) -> None:
    """One line. Facts must survive JSON."""
    logger = logging.getLogger(NAME)
    if not logger.handlers:
        logger.addHandler(_Bare())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    logger.info(json.dumps({"time": time, "event": event, **facts}))
