"""What stands in front of both planes' routes: request ids, keys, limits on bodies, one line of log per request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tawin_nemo.serve.engine.events import write_event
from tawin_nemo.serve.engine.metrics import Metrics
from tawin_nemo.serve.http.problems import Problem

#: Bodies up to so many times the limit are read to their end before they are refused.
DISCARDED = 8
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Observed:
    """Outermost: gives every request an id and counts and logs its end."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, plane: str) -> None:
        self._app, self._metrics, self._plane = app, metrics, plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state.update(request_id=name, reason="", note={})
        begun, status = time.monotonic(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            self._note(scope, status, time.monotonic() - begun)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route, state = scope.get("route"), scope["state"]
        endpoint = getattr(route, "path", "") or "other"
        self._metrics.requests.labels(f"{self._plane}:{endpoint}", str(status)).inc()
        self._metrics.seconds.labels("total").observe(seconds)
        if state["reason"]:
            self._metrics.rejections.labels(state["reason"]).inc()
        reason = {"reason": state["reason"]} if state["reason"] else {}
        write_event(
            "request", id=state["request_id"], plane=self._plane, method=scope["method"], endpoint=endpoint,
            status=status, ms=round(1000 * seconds, 2), **state["note"], **reason,
        )  # fmt: skip


class Keyed:
    """Asks for ``Authorization: Bearer KEY`` except on ``open_paths``; no keys = nobody is asked."""

    def __init__(self, app: ASGIApp, *, keys: Collection[str], open_paths: Collection[str] = ()) -> None:
        self._app, self._open = app, frozenset(open_paths)
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] in self._open or self._knows(scope):
            await self._app(scope, receive, send)
            return
        scope["state"]["reason"] = "auth"
        problem = Problem(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        await problem.response()(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # Every key is compared in full, so that the time says nothing about which one came close.
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(found) and kind.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Limited:
    """Refuses bodies that are too large (413) or come too slowly (408)."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float) -> None:
        self._app, self._max, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except Problem as problem:
            scope["state"]["reason"] = problem.reason
            response = problem.response()
            response.headers["connection"] = "close"  # what is left of the body is not read
            await response(scope, receive, send)
            return
        if body is None:  # the client is gone
            scope["state"]["reason"] = "disconnected"
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body, None when the client has gone. What is too large is read as well, within limits, and forgotten: a
        connection that is closed with bytes unread is reset, and the client never sees why."""
        too_large = Problem(413, f"the body is larger than {self._max} bytes", reason="body", code="body_too_large")
        length = headers.get("content-length", "")
        announced = int(length) if length.isdigit() else 0
        asks_first = headers.get("expect", "").lower() == "100-continue"
        if announced > (self._max if asks_first else DISCARDED * self._max):
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
                    elif size > DISCARDED * self._max or not message.get("more_body", False):
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            if max(size, announced) > self._max:
                raise too_large from None
            text = f"the body did not come within {self._seconds:g} s"
            raise Problem(408, text, reason="slow_body", code="slow_body") from None


async def until_gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def first_of(work: asyncio.Future[Any], other: Awaitable[None], seconds: float) -> str:
    """Which came first: ``done``, ``gone`` (the other) or ``late``."""
    gone = asyncio.ensure_future(other)
    try:
        await asyncio.wait({work, gone}, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        return "done" if work.done() else "gone" if gone.done() else "late"
    finally:
        gone.cancel()


def note(request: Request, **facts: Any) -> None:
    """Facts for the request's line in the log."""
    request.state.note.update(facts)


def without_422(openapi: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """FastAPI announces its own validation reply, which ``handle_problems`` replaces."""

    def cleaned() -> dict[str, Any]:
        document = openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        return document

    return cleaned
