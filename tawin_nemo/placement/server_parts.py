"""The parts of one call to generation servers: how prompts are divided, and which part has been answered; and what is
known of each server.

The division depends on the lengths of the prompts, the number of servers in the recipe and their request limits, but
not on which servers are available. A part is thus the same model calls on any server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.api.schema import RolloutTerms
from tawin_nemo.data.batches import balanced_shard
from tawin_nemo.placement.servers import GenerationServer
from tawin_nemo.types import DataParallel
from tawin_nemo.util.errors import ConfigError, TawinError

#: Upper bounds of the JSON of a request: bytes of one token, and of everything but the prompts.
_TOKEN_BYTES, _BODY_BYTES = 9, 8192


class ServersLost(TawinError):
    """No server is available, or none answered a part of a rollout."""


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request: beams, KV-cache tokens (of prompts and beams), beam rows, bytes of the body."""

    beams: int = 1 << 62
    tokens: int = 1 << 62
    rows: int = 1 << 62
    body_bytes: int = 1 << 62

    @classmethod
    def of(cls, terms: RolloutTerms) -> RequestLimits:
        """The limits of a server."""
        return cls(terms.max_beams, terms.token_budget, terms.row_budget, 1024 * terms.max_body_kb)

    def narrowed(self, other: RequestLimits) -> RequestLimits:
        """The smaller of both in every respect."""
        return RequestLimits(
            min(self.beams, other.beams), min(self.tokens, other.tokens), min(self.rows, other.rows),
            min(self.body_bytes, other.body_bytes),
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


@dataclass(eq=False)
class Part:
    """Prompts that one server answers together, ``rows`` of the call; ``home``: the server that is to answer them."""

    home: int
    rows: np.ndarray
    tries: list[str] = field(default_factory=list)  # the error of every try
    tried: set[int] = field(default_factory=set)
    reply: RolloutReply | None = None


class Dispatch:
    """The parts of one call and who has which. Not thread-safe: its user holds a lock."""

    def __init__(self, parts: Sequence[tuple[int, np.ndarray]], max_tries: int) -> None:
        self.parts, self._max_tries = [Part(home, rows) for home, rows in parts], max_tries
        self._waiting = set(range(len(parts)))

    @property
    def answered(self) -> bool:
        """Whether all parts have a reply."""
        return all(part.reply is not None for part in self.parts)

    def take(self, server: int) -> Part | None:
        """A waiting part, preferably one of this server; None when none waits."""
        if not self._waiting:
            return None
        best = min(
            self._waiting, key=lambda at: (server in self.parts[at].tried, self.parts[at].home != server, at)
        )  # fmt: skip
        self._waiting.remove(best)
        return self.parts[best]

    def requeue(self, part: Part, server: int, error: str) -> None:
        """Let another server, or this one later, answer a part. Raises ServersLost after the last try."""
        part.tried.add(server)
        part.tries.append(error)
        self._waiting.add(next(at for at, other in enumerate(self.parts) if other is part))
        if len(part.tries) >= self._max_tries:
            raise ServersLost(
                f"a part of a rollout was not answered in rollout.server_tries={self._max_tries} tries: "
                f"{'; '.join(part.tries)}"
            )


@dataclass(eq=False)
class Member:
    """A server and what the pool knows of it. ``reason``: why it is excluded, empty while it is not."""

    number: int
    server: GenerationServer
    reason: str = ""
    mistake: ConfigError | None = None  # it does not fit this run
    update: int = -1  # number of the push that it has taken; 0 = connected, without weights of this run
    version: int = 0  # the newest that it has called its weights, or was asked to
    failures: int = 0  # since it last answered a part
    retry_at: float = 0.0
    lost_at: float = 0.0
    joining: bool = False  # it answers, and is being sent weights
    tried_alone: bool = False  # since no server is left
