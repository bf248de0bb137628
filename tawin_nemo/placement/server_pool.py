"""The pool of all generation servers of a run: divides prompts among them and retries failed parts on other servers.

The division depends on the lengths of the prompts, the number of servers in the recipe and their request limits, but
not on which servers are available. A part is thus the same model calls on any server; a server runs one part of this
run at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
from torch import Tensor

from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.api.schema import RolloutTerms
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.data.batches import balanced_shard
from tawin_nemo.models.megatron.parallel.weight_group import host_store
from tawin_nemo.placement.servers import ExpectedTerms, GenerationServer, Unavailable
from tawin_nemo.types import DataParallel
from tawin_nemo.util.errors import ConfigError, TawinError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)
#: Upper bounds of the JSON of a request: bytes of one token, and of everything but the prompts.
_TOKEN_BYTES, _BODY_BYTES = 9, 8192


class ServersLost(TawinError):
    """No server is available, or none answered a part of a rollout."""


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request: beams, KV-cache tokens (of prompts and beams), beam rows, bytes of the body."""

    beams: int
    tokens: int
    rows: int
    body_bytes: int

    def narrowed(self, terms: RolloutTerms) -> RequestLimits:
        """The smaller of these limits and those of a server."""
        return RequestLimits(
            min(self.beams, terms.max_beams), min(self.tokens, terms.token_budget), min(self.rows, terms.row_budget),
            min(self.body_bytes, 1024 * terms.max_body_kb),
        )  # fmt: skip


def split_prompts(
    lengths_B: np.ndarray, servers: int, width: int, depth: int, limit: RequestLimits
) -> list[tuple[int, np.ndarray]]:
    """(preferred server, indices of prompts) of every part.

    Each server gets a share of similar length, which is split, longest prompt first, into parts within the limits; a
    prompt beyond the limits is a part of its own. ``depth``: tokens that a beam may run.
    """
    parts: list[tuple[int, np.ndarray]] = []
    for server in range(servers):
        mine = balanced_shard(np.arange(len(lengths_B)), lengths_B, DataParallel(server, servers))
        part: list[int] = []
        for row in mine[np.argsort(-lengths_B[mine], kind="stable")].tolist():
            longer = [*part, row]
            length = int(lengths_B[longer].sum())
            fits = (
                length + len(longer) * width * depth <= limit.tokens
                and len(longer) * width <= limit.rows
                and length * _TOKEN_BYTES + _BODY_BYTES <= limit.body_bytes
            )
            if part and not fits:
                parts.append((server, np.array(part)))
                longer = [row]
            part = longer
        if part:
            parts.append((server, np.array(part)))
    return parts


@dataclass
class _Part:
    home: int
    tries: list[str] = field(default_factory=list)  # the error of every try
    tried: set[int] = field(default_factory=set)
    reply: RolloutReply | None = None


class _Dispatch:
    """The parts of one call and their state; workers, one per server, take one part at a time."""

    def __init__(self, homes: Sequence[int], max_tries: int) -> None:
        self.parts, self._max_tries = [_Part(home) for home in homes], max_tries
        self._free = set(range(len(homes)))
        self._in_flight = 0
        self._changed = threading.Condition()
        self._over = False

    @property
    def unanswered(self) -> bool:
        return any(part.reply is None for part in self.parts)

    def take(self, server: int) -> int | None:
        """The index of a waiting part, preferably of this server; None when all are answered or the call is aborted."""
        with self._changed:
            while not self._over:
                if self._free:
                    best = min(
                        self._free, key=lambda at: (server in self.parts[at].tried, self.parts[at].home != server, at)
                    )
                    self._free.remove(best)
                    self._in_flight += 1
                    return best
                if not self._in_flight:
                    return None
                self._changed.wait()
            return None

    def answered(self, at: int, reply: RolloutReply) -> None:
        with self._changed:
            self.parts[at].reply = reply
            self._in_flight -= 1
            self._changed.notify_all()

    def requeue(self, at: int, server: int, name: str, error: Exception) -> None:
        """Return a failed part to the queue. Raises ServersLost after ``rollout.server_tries`` tries."""
        with self._changed:
            part = self.parts[at]
            part.tried.add(server)
            part.tries.append(f"{name}: {error}")
            self._in_flight -= 1
            self._free.add(at)
            self._changed.notify_all()
            if len(part.tries) >= self._max_tries:
                self._over = True
                raise ServersLost(
                    f"a part of a rollout was not answered in rollout.server_tries={self._max_tries} tries: "
                    f"{'; '.join(part.tries)}"
                )

    def abort(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()


class ServerPool:
    """The servers of ``rollout.servers``, on the first training rank.

    Construction raises ServersLost when no server is available, ConfigError when one does not match the run.
    """

    def __init__(self, cfg: RolloutConfig, expected: ExpectedTerms) -> None:
        store = host_store(timedelta(seconds=cfg.server_timeout_s))
        self._cfg, self._writing = cfg, threading.Lock()
        self.servers = [GenerationServer(name, cfg, expected, store) for name in cfg.servers]
        self._tensors: Mapping[str, Tensor] = {}
        self._version = 0  # of the newest weights, as servers count
        self._limit = RequestLimits(1 << 62, 1 << 62, 1 << 62, 1 << 62)
        self._on_all(self.servers, self._connected)
        self._check_any_left()
        log.info("rollouts and evaluation on %d of %d generation servers", len(self._in_use), len(self.servers))

    @property
    def _in_use(self) -> list[GenerationServer]:
        return [server for server in self.servers if not server.unavailable_reason]

    def push(self, tensors: Mapping[str, Tensor]) -> None:
        """Send the weights to all servers, excluded ones included, and keep them for servers that return later.

        Raises ServersLost when no server has received them.
        """
        self._tensors = tensors
        self._reconnect_and_push()

    def run(
        self, lengths_B: np.ndarray, width: int, depth: int, token_budget: int,
        send: Callable[[GenerationServer, int, np.ndarray], RolloutReply],
    ) -> list[tuple[np.ndarray, RolloutReply]]:  # fmt: skip
        """(indices of prompts, their reply) of every part; ``send(server, version, prompts)`` requests one part.

        Raises ServersLost when no server is left or a part failed too often, ConfigError for too many beams.
        """
        limit = self._limit
        if width > limit.beams:
            raise ConfigError(
                f"{width} beams or draws are more than serve.max_beams={limit.beams} of the generation servers; start "
                "them with more, or lower rollout.width, rl.group_size or eval.beams"
            )
        limit = RequestLimits(limit.beams, min(limit.tokens, token_budget), limit.rows, limit.body_bytes)
        parts = split_prompts(lengths_B, len(self.servers), width, depth, limit)
        dispatch = _Dispatch([home for home, _ in parts], self._cfg.server_tries)

        def serve(server: GenerationServer) -> None:
            number = self.servers.index(server)
            try:
                while (at := dispatch.take(number)) is not None:
                    try:
                        dispatch.answered(at, send(server, self._version, parts[at][1]))
                    except Unavailable as error:
                        self._failed(server, error)
                        dispatch.requeue(at, number, server.name, error)
                        if error.lost:
                            return
                        time.sleep(error.wait)
            except BaseException:
                dispatch.abort()
                raise

        while dispatch.unanswered:
            if not self._in_use:
                self._reconnect_and_push()
            self._on_all(self._in_use, serve)
        return [
            (rows, part.reply) for (_, rows), part in zip(parts, dispatch.parts, strict=True) if part.reply is not None
        ]

    def close(self) -> None:
        """Disconnect from all servers, which drop their weight groups."""
        for server in self.servers:
            server.close()

    # -- servers in use -----------------------------------------------------------------------------------------------
    def _reconnect_and_push(self) -> None:
        """Connect to all servers and push the newest weights to them. Raises ServersLost when there is none."""
        self._on_all(self.servers, self._connected)
        self._push_weights()

    def _push_weights(self) -> None:
        self._check_any_left()
        self._version += 1
        self._on_all(self._in_use, lambda server: server.push(self._tensors, self._version))
        self._check_any_left()

    def _connected(self, server: GenerationServer) -> None:
        terms = server.connect()
        with self._writing:
            self._limit = self._limit.narrowed(terms)
            self._version = max(self._version, terms.weight_version)  # what is pushed next is newer than all
        if server.unavailable_reason:
            log.info("generation server %s is available again", server.name)
            server.unavailable_reason = ""

    def _failed(self, server: GenerationServer, error: Unavailable) -> None:
        if error.lost:
            server.unavailable_reason = str(error)
            server.disconnect()
            log.warning("generation server %s is excluded until it receives new weights: %s", server.name, error)
        else:
            log.warning("generation server %s is busy, retrying in %g s: %s", server.name, error.wait, error)

    def _check_any_left(self) -> None:
        if not self._in_use:
            tried = "; ".join(f"{server.name}: {server.unavailable_reason}" for server in self.servers)
            raise ServersLost(
                f"no generation server is left ({tried}); start them again (tawin-nemo serve), then run the same "
                "command"
            )

    def _on_all(self, servers: Sequence[GenerationServer], act: Callable[[GenerationServer], None]) -> None:
        """Call ``act`` for all servers in parallel; an unavailable server is excluded, other errors are raised."""

        def acted(server: GenerationServer) -> None:
            try:
                act(server)
            except Unavailable as error:
                self._failed(server, Unavailable(str(error)))

        if not servers:
            return
        with ThreadPoolExecutor(len(servers)) as threads:
            ended = [threads.submit(acted, server) for server in servers]
        for future in ended:
            future.result()
