"""An HTTP server in a thread of the test that keeps what it was sent: a stand-in of a Pushgateway or a collector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.parser import text_string_to_metric_families

#: The labels of a sample, as they can be looked up.
Labels = frozenset[tuple[str, str]]


@dataclass
class Receiver:
    """``url`` and the requests so far: (method and path, body)."""

    url: str
    requests: list[tuple[str, bytes]] = field(default_factory=list)

    def pushed(self) -> list[dict[tuple[str, Labels], float]]:
        """Every push in Prometheus' text format: (metric, labels) -> value."""
        return [
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(body.decode())
                for sample in family.samples
            }
            for line, body in self.requests
            if "/metrics/job/" in line
        ]

    def exported(self) -> list[dict[tuple[str, Labels], float]]:
        """Every export of gauges over OTLP: (metric, attributes) -> value."""
        return [_gauges(body) for line, body in self.requests if line == "POST /v1/metrics"]

    def resources(self) -> list[dict[str, str]]:
        """Attributes of the resource of every export over OTLP."""
        messages = [ExportMetricsServiceRequest.FromString(body) for line, body in self.requests if "/v1/" in line]
        return [
            {pair.key: pair.value.string_value for pair in message.resource_metrics[0].resource.attributes}
            for message in messages
        ]


def _gauges(body: bytes) -> dict[tuple[str, Labels], float]:
    return {
        (metric.name, frozenset((pair.key, pair.value.string_value) for pair in point.attributes)): (
            point.as_double if point.HasField("as_double") else float(point.as_int)
        )
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.gauge.data_points
    }


@contextmanager
def receiver(status: int = 200) -> Iterator[Receiver]:
    """A server that answers every request with ``status``."""

    class Handler(BaseHTTPRequestHandler):
        def _take(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kept.requests.append((f"{self.command} {self.path}", body))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_PUT = do_POST = _take

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept = Receiver(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()
