"""What /metrics shows."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: Why a request was not answered.
REJECTIONS = (
    *("queue_full", "deadline", "disconnected", "paused", "draining", "body", "slow_body", "auth", "invalid"),
    *("stale_weights", "fault", "aborted"),
)
#: Of a request: waiting, in the engine, all of it. Of the engine's thread: letting in, one model call, draws.
PHASES = ("queue", "run", "total", "admit", "step", "draw")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_SHARING = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """One server's figures, in a registry of their own. Names end as Prometheus asks: seconds, total."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("tawin_requests", "replies by endpoint and status", ["endpoint", "code"], registry=own)
        self.rejections = Counter("tawin_rejections", "requests not answered, by reason", ["reason"], registry=own)
        self.queued = Gauge("tawin_queued_requests", "requests waiting for the engine", registry=own)
        self.running = Gauge("tawin_running_requests", "requests in the engine", registry=own)
        self.beams = Gauge("tawin_beam_rows", "beams running", registry=own)
        self.held = Gauge("tawin_held_tokens", "tokens of the cache, with what beams may still run", registry=own)
        self.sharing = Histogram(
            "tawin_requests_per_branch_step", "requests that share one model call", buckets=_SHARING, registry=own
        )
        self.step_rows = Histogram("tawin_rows_per_branch_step", "beams of one model call", buckets=_ROWS, registry=own)
        self.seconds = Histogram(
            "tawin_phase_seconds", "time of a request (queue, run, total) and of the engine (admit, step, draw)",
            ["phase"], buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.tokens = Counter(
            "tawin_tokens",
            "tokens of prompts and of answers, and those of answers without an alternative",
            ["kind"],
            registry=own,
        )
        self.weight_version = Gauge(
            "tawin_weight_version", "version of the weights that new requests get", registry=own
        )
        self.catalog_version = Gauge("tawin_catalog_version", "version of the catalog in use", registry=own)
        self.versions = Gauge("tawin_versions_in_memory", "weights and catalogs held", ["kind"], registry=own)
        self.items = Gauge("tawin_catalog_items", "items that can be recommended", registry=own)
        self.swaps = Counter("tawin_swaps", "activations of weights and catalogs", ["kind"], registry=own)
        for reason in REJECTIONS:
            self.rejections.labels(reason)
        for kind in ("prompt", "answer", "forced"):
            self.tokens.labels(kind)
        for phase in PHASES:
            self.seconds.labels(phase)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return bytes(generate_latest(self.registry))
