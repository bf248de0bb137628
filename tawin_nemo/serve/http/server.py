"""Both planes on their sockets in one event loop, from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from tawin_nemo.config.schema import ServeConfig
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.http.control import ControlPlane, control_app
from tawin_nemo.serve.http.data_plane import DataPlane, data_app
from tawin_nemo.serve.http.requests import Terms
from tawin_nemo.util.errors import ConfigError, Preempted, TawinError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: Seconds for replies that are being sent when the server ends.
LAST_REPLIES = 5
#: SIGUSR1 is Slurm's word before a time limit: the job is to be started again.
AGAIN = signal.SIGUSR1


@dataclass(frozen=True)
class Secrets:
    keys: list[str]
    token: str


class Server:
    """Bound to its ports when made; ``run`` serves until a signal, ``shutdown`` or the engine ends it."""

    def __init__(self, engine: Engine, terms: Terms, secrets: Secrets, *, roots: list[Path]) -> None:
        settings = terms.settings
        self.engine, self._settings = engine, settings
        self.data_socket = bound(settings.host, settings.port, "serve.port")
        self.control_socket = bound(settings.control_host, settings.control_port, "serve.control_port")
        self._data = data_app(DataPlane(engine, terms), keys=secrets.keys)
        plane = ControlPlane(engine, terms, roots=roots, leave=self.leave)
        self._control = control_app(plane, token=secrets.token)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving: asyncio.Event | None = None
        self._drain_s = settings.drain_s
        self._again = False
        if not secrets.keys and settings.host not in ("127.0.0.1", "::1", "localhost"):
            log.warning("serve.host=%s without serve.api_keys_file: everybody who reaches it is served", settings.host)

    @property
    def ports(self) -> tuple[int, int]:
        """Of the data plane and of the control plane."""
        return self.data_socket.getsockname()[1], self.control_socket.getsockname()[1]

    def leave(self, seconds: float) -> None:
        """Take no more requests, give those that are here so long, and end. From any thread."""
        self.engine.close("draining")
        self._drain_s = seconds
        if self._loop is not None and self._leaving is not None:
            with contextlib.suppress(RuntimeError):  # it has left already
                self._loop.call_soon_threadsafe(self._leaving.set)

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve. ``ready`` is called when both planes answer.

        Raises TawinError when the engine ended with an error, Preempted after SIGUSR1.
        """
        asyncio.run(self._run(ready))
        error = self.engine.failed.exception() if self.engine.failed.done() else None
        if error is not None:
            raise TawinError(f"the engine ended with an error: {error}") from error
        self.engine.stop()
        if self._again:
            raise Preempted("SIGUSR1: the server has drained; start it again")

    async def _run(self, ready: Callable[[], None]) -> None:
        self._loop, self._leaving = asyncio.get_running_loop(), asyncio.Event()
        if self.engine.closed:  # told to leave before it came here
            self._leaving.set()
        servers = [_Quiet(_config(app, self._settings.read_timeout_s)) for app in (self._data, self._control)]
        tasks = [
            asyncio.create_task(server.serve(sockets=[place]))
            for server, place in zip(servers, (self.data_socket, self.control_socket), strict=True)
        ]
        ended = asyncio.wrap_future(self.engine.failed)
        left = asyncio.create_task(self._leaving.wait())
        ends: list[asyncio.Future[Any]] = [ended, left, *tasks]
        with self._signals():
            while not all(server.started for server in servers):
                await asyncio.sleep(0.01)
            ready()
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await self._drained()
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*tasks)
            left.cancel()
            with contextlib.suppress(Exception):
                if ended.done():
                    ended.result()

    async def _drained(self) -> None:
        self.engine.close("draining")
        end = time.monotonic() + self._drain_s
        log.info("draining: %d requests get up to %g s", self.engine.busy, self._drain_s)
        while self.engine.busy and time.monotonic() < end and not self.engine.failed.done():
            await asyncio.sleep(0.02)
        if self.engine.busy and not self.engine.failed.done():
            log.warning("%d requests are given up", self.engine.busy)
            await asyncio.to_thread(self.engine.abort)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT drain; SIGUSR1 as well, and asks to be started again. Not outside the main thread."""
        assert self._loop is not None
        taken = []
        for number in (signal.SIGTERM, signal.SIGINT, AGAIN):
            with contextlib.suppress(ValueError, RuntimeError):
                self._loop.add_signal_handler(number, self._asked, number)
                taken.append(number)
        try:
            yield
        finally:
            for number in taken:
                self._loop.remove_signal_handler(number)

    def _asked(self, number: signal.Signals) -> None:
        log.info("%s: draining", signal.Signals(number).name)
        self._again = self._again or number == AGAIN
        self.leave(self._settings.drain_s)


class _Quiet(uvicorn.Server):
    """Signals are the business of ``Server``, which has two of these."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _protocol_with_head_timeout(seconds: float) -> type[H11Protocol]:
    """Uvicorn's HTTP protocol, but a connection is closed unless its first request's head arrives within ``seconds``.

    Uvicorn has a time limit for idle connections between requests only; ``middleware.BodyLimits`` limits bodies.
    """

    class HeadTimeout(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(seconds, self._close_without_request)

        def _close_without_request(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return HeadTimeout


def _config(app: FastAPI, seconds: float) -> uvicorn.Config:
    return uvicorn.Config(
        app, http=_protocol_with_head_timeout(seconds), ws="none", lifespan="off", loop="asyncio", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=LAST_REPLIES,
    )  # fmt: skip


def bound(host: str, port: int, key: str) -> socket.socket:
    """A listening socket. Raises ConfigError when the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off on sockets of a named protocol only; with it a reply, which is written as
    # head and body, waits for the client's delayed acknowledgement: 40 ms
    place = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((host, port))
        place.listen(1024)
    except OSError as error:
        place.close()
        raise ConfigError(f"{key}={port} on {host} cannot be used ({error.strerror}); choose another one") from error
    return place


def settings_of(serve: ServeConfig, run_dir: Path) -> tuple[list[Path], Path]:
    """The roots that paths are confined to, and the folder that the server writes into."""
    return [Path(root) for root in serve.roots] or [run_dir], run_dir / "serve"
