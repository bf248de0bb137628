"""All generation servers of a run: prompts are divided among them, and what one does not answer another one does.

How prompts are divided depends on their lengths, the number of servers in the recipe and what servers take at once, and
not on who is alive: a part is the same model calls wherever it is run, and a server runs one part of ours at a time.
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
#: Bytes of one token of a request's JSON, at most, and of everything around the prompts.
_TOKEN_BYTES, _BODY_BYTES = 9, 8192


class ServersLost(TawinError):
    """No server is left, or none would answer a part of a rollout."""


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask: beams, tokens held (prompts and what beams may run), rows, bytes."""

    beams: int
    tokens: int
    rows: int
    body_bytes: int

    def narrowed(self, terms: RolloutTerms) -> RequestLimits:
        return RequestLimits(
            min(self.beams, terms.max_beams), min(self.tokens, terms.token_budget), min(self.rows, terms.row_budget),
            min(self.body_bytes, 1024 * terms.max_body_kb),
        )  # fmt: skip


def split_prompts(
    lengths_B: np.ndarray, servers: int, width: int, depth: int, limit: RequestLimits
) -> list[tuple[int, np.ndarray]]:
    """(server that is meant, prompts) of every part: shares of similar length, each from its longest prompt on in parts
    that keep the limits; a prompt beyond them goes alone. ``depth``: tokens that a beam may run."""
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
    tries: list[str] = field(default_factory=list)  # what every try came to
    tried: set[int] = field(default_factory=set)
    reply: RolloutReply | None = None


class _Dispatch:
    """The parts of one call on their way; workers, one per server, take them one at a time."""

    def __init__(self, homes: Sequence[int], most: int) -> None:
        self.parts, self._most = [_Part(home) for home in homes], most
        self._free = set(range(len(homes)))
        self._in_flight = 0
        self._changed = threading.Condition()
        self._over = False

    @property
    def unanswered(self) -> bool:
        return any(part.reply is None for part in self.parts)

    def take(self, server: int) -> int | None:
        """A part that waits, best one of this server's own; None when all are answered or the call is given up."""
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

    def requeue(self, at: int, server: int, name: str, why: Exception) -> None:
        """Raises ServersLost when the part was tried as often as it may be."""
        with self._changed:
            part = self.parts[at]
            part.tried.add(server)
            part.tries.append(f"{name}: {why}")
            self._in_flight -= 1
            self._free.add(at)
            self._changed.notify_all()
            if len(part.tries) >= self._most:
                self._over = True
                raise ServersLost(
                    f"a part of a rollout was not answered in rollout.server_tries={self._most} tries: "
                    f"{'; '.join(part.tries)}"
                )

    def give_up(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()


class ServerPool:
    """On the first training rank; the constructor raises ServersLost when no server is there, ConfigError when one does
    not fit."""

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
        """Give the weights to all servers, those that were left out among them. They are kept, for servers that come
        back later. Raises ServersLost when none has taken them."""
        self._tensors = tensors
        self._reconnect_and_push()

    def run(
        self, lengths_B: np.ndarray, width: int, depth: int, token_budget: int,
        ask: Callable[[GenerationServer, int, np.ndarray], RolloutReply],
    ) -> list[tuple[np.ndarray, RolloutReply]]:  # fmt: skip
        """(prompts, their reply) of every part; ``ask(server, version, prompts)`` gets one.

        Raises ServersLost when no server is left or a part was refused too often, ConfigError for too many beams.
        """
        limit = self._limit
        if width > limit.beams:
            raise ConfigError(
                f"{width} beams or draws are more than serve.max_beams={limit.beams} of the generation servers; start "
                "them with more, or lower rollout.width, rl.group_size or eval.beams"
            )
        limit = RequestLimits(limit.beams, min(limit.tokens, token_budget), limit.rows, limit.body_bytes)
        parts = split_prompts(lengths_B, len(self.servers), width, depth, limit)
        work = _Dispatch([home for home, _ in parts], self._cfg.server_tries)

        def serve(server: GenerationServer) -> None:
            number = self.servers.index(server)
            try:
                while (at := work.take(number)) is not None:
                    try:
                        work.answered(at, ask(server, self._version, parts[at][1]))
                    except Unavailable as error:
                        self._failed(server, error)
                        work.requeue(at, number, server.name, error)
                        if error.lost:
                            return
                        time.sleep(error.wait)
            except BaseException:
                work.give_up()
                raise

        while work.unanswered:
            if not self._in_use:
                self._reconnect_and_push()
            self._on_all(self._in_use, serve)
        return [(rows, part.reply) for (_, rows), part in zip(parts, work.parts, strict=True) if part.reply is not None]

    def close(self) -> None:
        """Let go of the servers, which forget the way that weights came."""
        for server in self.servers:
            server.close()

    # -- who is in use ------------------------------------------------------------------------------------------------
    def _reconnect_and_push(self) -> None:
        """All servers that can be reached get the newest weights. Raises ServersLost when there is none."""
        self._on_all(self.servers, self._connected)
        self._give_weights()

    def _give_weights(self) -> None:
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
            log.info("generation server %s is there again", server.name)
            server.unavailable_reason = ""

    def _failed(self, server: GenerationServer, error: Unavailable) -> None:
        if error.lost:
            server.unavailable_reason = str(error)
            server.disconnect()
            log.warning("generation server %s is left out until it takes new weights: %s", server.name, error)
        else:
            log.warning("generation server %s is busy, again in %g s: %s", server.name, error.wait, error)

    def _check_any_left(self) -> None:
        if not self._in_use:
            tried = "; ".join(f"{server.name}: {server.unavailable_reason}" for server in self.servers)
            raise ServersLost(
                f"no generation server is left ({tried}); start them again (tawin-nemo serve), then run the same "
                "command"
            )

    def _on_all(self, servers: Sequence[GenerationServer], act: Callable[[GenerationServer], None]) -> None:
        """``act`` on all of them at once; a server that is not available is left out, other errors are raised."""

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
