"""What the server reports about itself: Prometheus metrics for ``/metrics`` and JSON lines on stderr."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: Name of the logger that ``write_event`` writes to.
EVENT_LOGGER = "tawin_nemo.serve.events"
#: Reasons why a request was rejected: labels of ``tawin_rejections_total``.
REJECTIONS = (
    *("queue_full", "deadline", "disconnected", "paused", "draining", "body", "slow_body", "auth", "invalid"),
    *("stale_weights", "fault", "aborted"),
)
#: Labels of ``tawin_phase_seconds``. Per request: in the queue, in the engine, in total. Per call of the engine's
#: thread: admission, one decoding step, a batch of draws.
PHASES = ("queue", "run", "total", "admit", "step", "draw")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_SHARING = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """The metrics of one server, in a Prometheus registry of their own (several servers may share a process).

    ``variant``: the server's variant of an A/B test (``serve.variant``), a label of ``tawin_server_info``. Queries tell
    the variants apart by it: ``sum by (variant) (METRIC * on (instance) group_left (variant) tawin_server_info)``.
    """

    def __init__(self, variant: str = "") -> None:
        self.registry, self.variant = CollectorRegistry(), variant
        own = self.registry
        Gauge("tawin_server_info", "1, with the server's labels", ["variant"], registry=own).labels(variant).set(1)
        self.requests = Counter("tawin_requests", "responses by route and status", ["endpoint", "code"], registry=own)
        self.rejections = Counter("tawin_rejections", "rejected requests by reason", ["reason"], registry=own)
        self.queued = Gauge("tawin_queued_requests", "requests waiting for the engine", registry=own)
        self.running = Gauge("tawin_running_requests", "requests in the engine", registry=own)
        self.beams = Gauge("tawin_beam_rows", "beam rows of the running requests", registry=own)
        self.held = Gauge(
            "tawin_held_tokens", "KV-cache tokens in use, with those that running beams may still add", registry=own
        )
        self.sharing = Histogram(
            "tawin_requests_per_branch_step", "requests that share one model call", buckets=_SHARING, registry=own
        )
        self.step_rows = Histogram(
            "tawin_rows_per_branch_step", "beam rows of one model call", buckets=_ROWS, registry=own
        )
        self.seconds = Histogram(
            "tawin_phase_seconds", "seconds of a request (queue, run, total) and of the engine (admit, step, draw)",
            ["phase"], buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.tokens = Counter(
            "tawin_tokens", "prompt tokens, answer tokens, and forced answer tokens (those with a single choice)",
            ["kind"], registry=own,
        )  # fmt: skip
        self.weight_version = Gauge("tawin_weight_version", "weight version that new requests use", registry=own)
        self.catalog_version = Gauge("tawin_catalog_version", "catalog version that new requests use", registry=own)
        self.versions = Gauge("tawin_versions_in_memory", "weights and catalogs in memory", ["kind"], registry=own)
        self.items = Gauge("tawin_catalog_items", "items that can be recommended", registry=own)
        self.swaps = Counter("tawin_swaps", "activations of new weights and catalogs", ["kind"], registry=own)
        for reason in REJECTIONS:
            self.rejections.labels(reason)
        for kind in ("prompt", "answer", "forced"):
            self.tokens.labels(kind)
        for phase in PHASES:
            self.seconds.labels(phase)

    def show(self, *, weights: int, catalog: int, items: int, held: tuple[int, int]) -> None:
        """Set the gauges of the versions in use, and of how many weights and catalogs are ``held`` in memory."""
        self.weight_version.set(weights)
        self.catalog_version.set(catalog)
        self.items.set(items)
        self.versions.labels("weights").set(held[0])
        self.versions.labels("catalogs").set(held[1])

    def text(self) -> bytes:
        """All metrics in Prometheus' text format, version 0.0.4."""
        return bytes(generate_latest(self.registry))


class _StderrHandler(logging.Handler):
    """Writes bare messages to the process's current ``sys.stderr``."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(record.getMessage() + "\n")
        sys.stderr.flush()


def write_event(event: str, **fields: Any) -> None:
    """Write one JSON object as one line to stderr: UTC ``time``, ``event`` and ``fields``.

    Raises TypeError for a field that JSON cannot represent.
    """
    logger = logging.getLogger(EVENT_LOGGER)
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    logger.info(json.dumps({"time": time, "event": event, **fields}))
