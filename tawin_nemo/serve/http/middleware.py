"""ASGI middleware in front of the routes of both planes, outermost first:

1. ``CorrelationIdMiddleware`` (asgi-correlation-id): one id per request, in ``X-Request-Id`` and in the log
2. ``RequestLog``: one log line and the request metrics; a Prometheus library would bring metric names of its own
3. ``CORSMiddleware`` (starlette), on the data plane where ``serve.cors_origins`` is set
4. ``AuthenticationMiddleware`` (starlette) with ``BearerKeys``: before any body is read
5. ``BodyLimits``: size and time limits for bodies

``BodyLimits`` is own code because neither starlette nor uvicorn does its work. Starlette's
``RequestBodyLimitMiddleware`` closes the connection with unread bytes, which resets it, so that the client never reads
the 413. Uvicorn has no time limit for requests that arrive slowly (for heads see ``server``). Its ``limit_concurrency``
counts idle connections and answers with plain text, whereas the engine's queue (``serve.max_queue``) answers 429 with
Retry-After in the API's error format.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Collection, Sequence

from asgi_correlation_id import CorrelationIdMiddleware, correlation_id
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, BaseUser, SimpleUser
from starlette.datastructures import Headers
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tawin_nemo.serve.engine.telemetry import Metrics, write_event
from tawin_nemo.serve.http.errors import ApiError

#: A body that is larger than the limit is read to its end before the 413, up to so many times the limit.
DRAINED_LIMITS = 8
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# The library logs a warning for every id that it replaces; a client must not be able to fill the log.
logging.getLogger("asgi_correlation_id").setLevel(logging.ERROR)


def add_middleware(
    app: FastAPI, *, plane: str, metrics: Metrics, keys: Collection[str], open_paths: Collection[str],
    max_body_bytes: int, read_timeout_s: float, cors_origins: Sequence[str] = (),
) -> None:  # fmt: skip
    """Put all middleware in front of an application.

    ``plane``: "data" or "control", for the log and the metrics' labels; ``keys``: accepted bearer keys (none: no
    authentication); ``open_paths``: paths that need no key.
    """
    app.add_middleware(BodyLimits, max_bytes=max_body_bytes, seconds=read_timeout_s)
    if keys:
        app.add_middleware(AuthenticationMiddleware, backend=BearerKeys(keys, open_paths), on_error=_unauthenticated)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origins, allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )  # fmt: skip
    app.add_middleware(RequestLog, metrics=metrics, plane=plane)
    app.add_middleware(
        CorrelationIdMiddleware, header_name="X-Request-Id", validator=lambda name: bool(_REQUEST_ID.fullmatch(name))
    )


class RequestLog:
    """Writes one log line per request and updates the request metrics when it ends; responses get ``X-Variant``.

    ``scope["state"]`` gets ``request_id``, ``reason`` (why the request was rejected, or empty) and ``log_fields``
    (further fields of the log line, which handlers fill in).
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, plane: str) -> None:
        self._app, self._metrics, self._plane = app, metrics, plane
        self._variant_header = (b"x-variant", metrics.variant.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {}).update(request_id=correlation_id.get(), reason="", log_fields={})
        begun, status = time.monotonic(), 500

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._metrics.variant:
                    message = {**message, "headers": [*message.get("headers", ()), self._variant_header]}
            await send(message)

        try:
            await self._app(scope, receive, send_and_note_status)
        finally:
            self._finish(scope, status, time.monotonic() - begun)

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        route, state = scope.get("route"), scope["state"]
        endpoint = getattr(route, "path", "") or "other"
        self._metrics.requests.labels(f"{self._plane}:{endpoint}", str(status)).inc()
        self._metrics.seconds.labels("total").observe(seconds)
        if state["reason"]:
            self._metrics.rejections.labels(state["reason"]).inc()
        further = {"reason": state["reason"], "variant": self._metrics.variant}
        write_event(
            "request", id=state["request_id"], plane=self._plane, method=scope["method"], endpoint=endpoint,
            status=status, ms=round(1000 * seconds, 2), **state["log_fields"],
            **{name: text for name, text in further.items() if text},
        )  # fmt: skip


class BearerKeys(AuthenticationBackend):
    """Accepts ``Authorization: Bearer KEY`` for any of ``keys``, and every request to one of ``open_paths``."""

    def __init__(self, keys: Collection[str], open_paths: Collection[str] = ()) -> None:
        self._digests, self._open_paths = [_digest(key) for key in keys], frozenset(open_paths)

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        """Raises AuthenticationError without a valid key."""
        if conn.scope["path"] in self._open_paths:
            return None
        scheme, _, key = conn.headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        # Every key is compared in full, so that the response time does not depend on how close a key came.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches) or scheme.lower() != "bearer":
            raise AuthenticationError("a valid key is needed: Authorization: Bearer KEY")
        return AuthCredentials(["authenticated"]), SimpleUser("")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthenticated(conn: HTTPConnection, error: AuthenticationError) -> JSONResponse:
    conn.scope["state"]["reason"] = "auth"
    return ApiError(401, str(error), code="invalid_api_key").response()


class BodyLimits:
    """Rejects bodies larger than ``max_bytes`` (413) or not complete within ``seconds`` (408).

    The application gets the whole body as one message. See the module's docstring for what libraries do instead.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float) -> None:
        self._app, self._max, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except ApiError as error:
            scope["state"]["reason"] = error.reason
            response = error.response()
            response.headers["connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)
            return
        if body is None:
            scope["state"]["reason"] = "disconnected"
            return
        delivered = False

        async def receive_body_once() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()
            delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_body_once, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body, or None when the client has disconnected. Raises ApiError (413, 408).

        A body that is too large is read and discarded up to ``DRAINED_LIMITS`` times the limit, because closing a
        connection with unread bytes resets it and the client never reads the response.
        """
        too_large = ApiError(413, f"the body is larger than {self._max} bytes", reason="body", code="body_too_large")
        length = headers.get("content-length", "")
        announced = int(length) if length.isdigit() else 0
        waits_for_continue = headers.get("expect", "").lower() == "100-continue"
        if announced > (self._max if waits_for_continue else DRAINED_LIMITS * self._max):
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    if max(size, announced) <= self._max:
                        parts.append(message.get("body", b""))
                    elif size > DRAINED_LIMITS * self._max or not message.get("more_body", False):
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            if max(size, announced) > self._max:
                raise too_large from None
            text = f"the body did not arrive within {self._seconds:g} s"
            raise ApiError(408, text, reason="slow_body", code="slow_body") from None
