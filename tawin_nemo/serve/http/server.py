"""Both planes on their sockets in one event loop, from start to shutdown."""

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
from tawin_nemo.serve.engine.saved_changes import SavedChanges
from tawin_nemo.serve.http.control import ControlPlane, control_app
from tawin_nemo.serve.http.data_plane import DataPlane, data_app
from tawin_nemo.serve.http.follower import Follower
from tawin_nemo.serve.http.requests import ServerContext
from tawin_nemo.util.errors import ConfigError, Preempted, TawinError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: Seconds for responses that are being sent when the server ends.
GRACEFUL_SHUTDOWN_S = 5
#: Slurm sends SIGUSR1 before a job's time limit: the job is then requeued (exit code 75).
REQUEUE_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class Secrets:
    """``keys``: accepted by the data plane, none = open to all; ``token``: required by the control plane."""

    keys: list[str]
    token: str


class Server:
    """Binds both ports when constructed; ``run`` serves until a signal, ``/shutdown`` or an error of the engine.

    ``roots``: folders that paths in control requests must lie in; ``saved``: keeps catalog changes for a restart.
    Raises ConfigError for an unusable address or port.
    """

    def __init__(
        self, engine: Engine, context: ServerContext, secrets: Secrets, *, roots: list[Path], saved: SavedChanges
    ) -> None:
        settings = context.settings
        self.engine, self.context, self._settings = engine, context, settings
        self._follower: Follower | None = None
        self.data_socket = listening_socket(settings.host, settings.port, "serve.port")
        self.control_socket = listening_socket(settings.control_host, settings.control_port, "serve.control_port")
        self._data = data_app(DataPlane(engine, context), keys=secrets.keys)
        self.control = ControlPlane(engine, context, roots=roots, saved=saved, drain=self.drain)
        self._control = control_app(self.control, token=secrets.token)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Event | None = None
        self._drain_s = settings.drain_s
        self._requeue = False
        if not secrets.keys and settings.host not in ("127.0.0.1", "::1", "localhost"):
            log.warning("serve.host=%s without serve.api_keys_file: everybody who can connect is served", settings.host)

    @property
    def ports(self) -> tuple[int, int]:
        """The port of the data plane and that of the control plane."""
        return self.data_socket.getsockname()[1], self.control_socket.getsockname()[1]

    def follow(self, follower: Follower) -> None:
        """Let ``follower`` put published versions into use while the server runs."""
        self._follower = follower
        self.control.followed, self.control.refused = follower.followed, follower.refused

    def drain(self, seconds: float) -> None:
        """Reject new requests, wait up to ``seconds`` for the accepted ones, then end ``run``. Thread-safe."""
        self.engine.close("draining")
        self._drain_s = seconds
        if self._loop is not None and self._draining is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(self._draining.set)

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until the server is drained; ``ready`` is called once both planes accept connections.

        Raises TawinError when the engine ended with an error, Preempted after SIGUSR1.
        """
        asyncio.run(self._run(ready))
        error = self.engine.failed.exception() if self.engine.failed.done() else None
        if error is not None:
            raise TawinError(f"the engine ended with an error: {error}") from error
        self.engine.stop()
        if self._requeue:
            raise Preempted("SIGUSR1: the server has drained; start it again")

    async def _run(self, ready: Callable[[], None]) -> None:
        self._loop, self._draining = asyncio.get_running_loop(), asyncio.Event()
        if self.engine.closed:  # drained before it ran
            self._draining.set()
        servers = [
            _ServerWithoutSignals(_config(app, self._settings.read_timeout_s)) for app in (self._data, self._control)
        ]
        tasks = [
            asyncio.create_task(server.serve(sockets=[listener]))
            for server, listener in zip(servers, (self.data_socket, self.control_socket), strict=True)
        ]
        ended = asyncio.wrap_future(self.engine.failed)
        drained = asyncio.create_task(self._draining.wait())
        ends: list[asyncio.Future[Any]] = [ended, drained, *tasks]
        with self._signals():
            while not all(server.started for server in servers):
                await asyncio.sleep(0.01)
            if self._follower is not None:
                self._follower.start()
            ready()
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._follower is not None:
                self._follower.stop()
            if not ended.done():
                await self._finish_requests()
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*tasks)
            drained.cancel()
            with contextlib.suppress(Exception):
                if ended.done():
                    ended.result()

    async def _finish_requests(self) -> None:
        self.engine.close("draining")
        end = time.monotonic() + self._drain_s
        log.info("draining: %d requests get up to %g s", self.engine.busy, self._drain_s)
        while self.engine.busy and time.monotonic() < end and not self.engine.failed.done():
            await asyncio.sleep(0.02)
        if self.engine.busy and not self.engine.failed.done():
            log.warning("%d requests are aborted", self.engine.busy)
            await asyncio.to_thread(self.engine.abort)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGUSR1 drain the server; no effect outside of the main thread."""
        assert self._loop is not None
        installed = []
        for number in (signal.SIGTERM, signal.SIGINT, REQUEUE_SIGNAL):
            with contextlib.suppress(ValueError, RuntimeError):
                self._loop.add_signal_handler(number, self._on_signal, number)
                installed.append(number)
        try:
            yield
        finally:
            for number in installed:
                self._loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("%s: draining", signal.Signals(number).name)
        self._requeue = self._requeue or number == REQUEUE_SIGNAL
        self.drain(self._settings.drain_s)


class _ServerWithoutSignals(uvicorn.Server):
    """Installs no signal handlers: ``Server``, which runs two of these, handles signals itself."""

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
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
    )  # fmt: skip


def listening_socket(host: str, port: int, key: str) -> socket.socket:
    """A listening socket on ``host:port`` (port 0: any free one); ``key``: the setting that the error names.

    Raises ConfigError when the port is in use or the address does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets with an explicit protocol. Without it a response, which is written as
    # head and body, waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{key}={port} on {host} cannot be used ({error.strerror}); choose another one") from error
    return listener


def roots_and_folder(serve: ServeConfig, run_dir: Path) -> tuple[list[Path], Path]:
    """The folders that paths in control requests must lie in (default: the run's), and the server's output folder."""
    return [Path(root) for root in serve.roots] or [run_dir], run_dir / "serve"
