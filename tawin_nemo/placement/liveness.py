"""Calls to a server that may hang: a thread asks for signs of life meanwhile, and ends the call without any.

A process that is suspended, or a machine that has vanished, keeps its connections open: without this a call would last
until its own time limit, which must be as long as the longest rollout.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import httpx

from tawin_nemo.api.client import Client, ServerError

T = TypeVar("T")
#: Probes in the time without a sign of life after which a server counts as hung.
_PROBES = 4


class Watch:
    """``reason``: why the call was ended; empty while the server has shown signs of life."""

    reason = ""


@contextlib.contextmanager
def watched(url: str, silent_s: float, abort: Callable[[], None]) -> Iterator[Watch]:
    """Call ``abort`` when the server at ``url`` has not answered ``/health`` for ``silent_s`` seconds of the block.

    Any response is a sign of life. The first probe is sent after a quarter of that time, so that short calls cause
    none.
    """
    watch, over = Watch(), threading.Event()

    def probe() -> None:
        interval, seen = silent_s / _PROBES, time.monotonic()
        if over.wait(interval):
            return
        with Client(url, timeout_s=interval) as client:
            while True:
                try:
                    client.health()
                    seen = time.monotonic()
                except ServerError:
                    seen = time.monotonic()
                except httpx.TransportError:
                    if time.monotonic() - seen >= silent_s and not over.is_set():
                        watch.reason = f"has not answered /health for {silent_s:g} s (rollout.server_silent_s)"
                        abort()
                        return
                if over.wait(interval):
                    return

    threading.Thread(target=probe, name="server-probe", daemon=True).start()
    try:
        yield watch
    finally:
        over.set()


def in_thread(call: Callable[[], T]) -> Future[T]:
    """The future of ``call()`` in a thread that does not keep the process from ending, unlike those of an executor."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="server-call", daemon=True).start()
    return future
