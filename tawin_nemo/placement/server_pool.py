"""The pool of all generation servers of a run: one thread per server brings it up to date and sends it prompts.

A server that is lost (no connection, a hang, a time limit, an unexpected reply) is excluded: its prompts go to other
servers, and its thread tries to reach it again, with growing pauses, while the run needs rollouts. A server that comes
back, or joins late, is sent the newest weights, under a version number that it has never had, before it is sent
prompts. So a request that it may still be working on has other weights and shares no model call with new ones.

Which server answers changes nothing: prompts are divided alike whoever is available (``server_parts``), and a server
runs one part of this run at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import numpy as np
from torch import Tensor

from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.models.megatron.parallel.weight_group import host_store
from tawin_nemo.placement.server_parts import Dispatch, Member, Part, RequestLimits, ServersLost, split_prompts
from tawin_nemo.placement.servers import ExpectedTerms, GenerationServer, Unavailable
from tawin_nemo.run import signals
from tawin_nemo.util.errors import ConfigError, Preempted
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)
#: Pauses in seconds before a lost server is tried again: none, then this, doubled each time up to the longest.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
#: Seconds in which the threads must end when the pool is closed; a thread in a transfer of weights is left behind.
_END_S = 2.0
#: Seconds between two looks for a signal while no server is left.
_POLL_S = 1.0
#: Sends a part: (server, version of its weights, indices of prompts) -> reply.
Send = Callable[[GenerationServer, int, np.ndarray], RolloutReply]


@dataclass(frozen=True)
class _Call:
    """The parts that servers are to answer, and how one is sent."""

    dispatch: Dispatch
    send: Send


class ServerPool:
    """The servers of ``rollout.servers``, on the first training rank.

    Construction raises ServersLost when none is available for ``rollout.server_wait_s``, ConfigError when one does not
    match the run. One that does not match when it comes back is excluded; ConfigError is raised when no other is left.
    """

    def __init__(self, cfg: RolloutConfig, expected: ExpectedTerms) -> None:
        store = host_store(timedelta(seconds=cfg.server_timeout_s))
        self._cfg, self._changed = cfg, threading.Condition()
        servers = [GenerationServer(name, cfg, expected, store) for name in cfg.servers]
        self._members = [Member(number, server) for number, server in enumerate(servers)]
        self._tensors: Mapping[str, Tensor] = {}
        self._update = 0  # number of pushes
        self._limit = RequestLimits()
        self._starting, self._engaged, self._closed = True, False, False
        self._call: _Call | None = None
        self._error: BaseException | None = None
        self._alone_since, self._first_loss = 0.0, ""
        self._threads = [threading.Thread(target=self._work, args=(one,), daemon=True) for one in self._members]
        for thread in self._threads:
            thread.start()
        try:
            self._bring_up_to_date()
        except BaseException:
            self.close()
            raise
        self._starting = False
        there = sum(not member.reason for member in self._members)
        log.info("rollouts and evaluation on %d of %d generation servers", there, len(self._members))

    def push(self, tensors: Mapping[str, Tensor]) -> None:
        """Send the weights to all servers, and keep them for servers that come back later.

        Returns when every server has them or is excluded. Raises ServersLost when none takes them.
        """
        with self._changed:
            self._tensors = tensors
            self._update += 1
        self._bring_up_to_date()

    def run(
        self, lengths_B: np.ndarray, width: int, depth: int, token_budget: int, send: Send
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
        limit = limit.narrowed(RequestLimits(tokens=token_budget))
        parts = split_prompts(lengths_B, len(self._members), width, depth, limit)
        dispatch = Dispatch(parts, self._cfg.server_tries)
        with self._changed:
            self._call = _Call(dispatch, send)
        try:
            self._wait(lambda: dispatch.answered)
        finally:
            with self._changed:
                self._call = None
        return [(part.rows, part.reply) for part in dispatch.parts if part.reply is not None]

    def close(self) -> None:
        """Disconnect from all servers, which drop their weight groups."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for member, thread in zip(self._members, self._threads, strict=True):
            member.server.abort()
            if thread is not threading.current_thread():
                thread.join(_END_S)
            if not thread.is_alive():
                member.server.close()

    # -- the main thread ----------------------------------------------------------------------------------------------
    def _bring_up_to_date(self) -> None:
        def done() -> bool:
            waits = any(not member.reason and member.update != self._update for member in self._members)
            return not waits and any(not member.reason for member in self._members)

        self._wait(done)

    def _wait(self, done: Callable[[], bool]) -> None:
        """Let the servers' threads work until ``done()``.

        Raises what ended their work, ServersLost without servers, Preempted on a signal while there is none.
        """
        with self._changed:
            self._engaged = True
            self._changed.notify_all()
            try:
                while not done():
                    if self._error is not None:
                        raise self._error
                    left = self._seconds_left()
                    if left is not None and signals.received():
                        raise Preempted(f"{signals.received()} while no generation server is left")
                    if left is not None and left <= 0:
                        raise self._none_left()
                    self._changed.wait(None if left is None else min(left, _POLL_S))
            finally:
                self._engaged, self._error = False, None

    def _seconds_left(self) -> float | None:
        """Seconds that are left to wait for a server; None while there is one, or one has not been tried again.

        A server that is being sent weights counts as one.
        """
        if any(not member.reason or member.joining for member in self._members):
            return None
        if all(member.mistake for member in self._members):
            return 0.0
        left = self._alone_since + self._cfg.server_wait_s - time.monotonic()
        return left if left > 0 or all(member.tried_alone for member in self._members) else None

    def _none_left(self) -> Exception:
        mistakes = [member.mistake for member in self._members if member.mistake]
        if len(mistakes) == len(self._members):
            return mistakes[0]
        tried = "; ".join(f"{member.server.name}: {member.reason}" for member in self._members)
        return ServersLost(
            f"no generation server is left ({tried}), and none came back in "
            f"rollout.server_wait_s={self._cfg.server_wait_s:g} s; the first loss was {self._first_loss}; start them "
            "again (tawin-nemo serve), then run the same command"
        )

    # -- the thread of a server ---------------------------------------------------------------------------------------
    def _work(self, member: Member) -> None:
        while True:
            with self._changed:
                while (task := self._task(member)) is None:
                    if self._closed:
                        return
                    pause = member.retry_at - time.monotonic()
                    self._changed.wait(pause if self._engaged and pause > 0 else None)
            try:
                task()
            except BaseException as error:  # not the server's fault: the main thread raises it
                self._error = error
            with self._changed:
                self._changed.notify_all()

    def _task(self, member: Member) -> Callable[[], None] | None:
        """What this server's thread can do now."""
        if self._closed or not self._engaged or self._error is not None or time.monotonic() < member.retry_at:
            return None
        if member.update != self._update:
            return partial(self._join, member, self._update, self._tensors)
        call = self._call
        part = None if call is None else call.dispatch.take(member.number)
        return None if call is None or part is None else partial(self._answer, member, call, part)

    def _join(self, member: Member, update: int, tensors: Mapping[str, Tensor]) -> None:
        """Connect to a server and send it the newest weights."""
        server = member.server
        try:
            terms = server.connect()
            self._accept(RequestLimits.of(terms))
            member.joining = True
            if update:
                member.version = max(member.version, terms.weight_version) + 1
                server.push(tensors, member.version)
        except ConfigError as error:
            if self._starting:
                raise
            self._exclude(member, str(error), error)
        except Unavailable as error:
            self._exclude(member, str(error), wait=error.wait)
        else:
            with self._changed:
                if member.reason:
                    text = "generation server %s is available, with the current weights, after %.1f s"
                    log.info(text, server.name, time.monotonic() - member.lost_at)
                member.update, member.reason, member.mistake = update, "", None
                if all(not other.reason for other in self._members):
                    self._first_loss = ""
        finally:
            member.joining = False

    def _accept(self, limit: RequestLimits) -> None:
        """Narrow the limits of requests at the start; later they must hold, since they decide how prompts are divided.

        Raises Unavailable for a server whose limits are narrower.
        """
        with self._changed:
            narrowed = self._limit.narrowed(limit)
            if narrowed != self._limit and not self._starting:
                raise Unavailable(
                    "its serve.max_beams, token_budget, row_budget or max_body_kb is below those of the servers that "
                    "this run began with, and would divide prompts in another way; start all servers with the same"
                )
            self._limit = narrowed

    def _answer(self, member: Member, call: _Call, part: Part) -> None:
        """Send a part to a server; one that fails goes back to the queue."""
        server = member.server
        try:
            part.reply = call.send(server, member.version, part.rows)
            member.failures = 0
        except Unavailable as error:
            with self._changed:
                if error.lost:
                    self._exclude(member, str(error))
                else:
                    log.warning("generation server %s is busy, retrying in %g s: %s", server.name, error.wait, error)
                    member.retry_at = time.monotonic() + error.wait
                call.dispatch.requeue(part, member.number, f"{server.name}: {error}")
                text = "%d prompts of %s are sent again (try %d of %d)"
                log.info(text, len(part.rows), server.name, len(part.tries) + 1, self._cfg.server_tries)

    def _exclude(
        self, member: Member, reason: str, mistake: ConfigError | None = None, *, wait: float = 0.0
    ) -> None:  # fmt: skip
        """Use a server no more until it has been sent the newest weights; it is tried again after a pause."""
        member.server.disconnect()
        now = time.monotonic()
        with self._changed:
            first, again = not member.reason, member.reason == reason
            member.reason, member.mistake, member.update = reason, mistake, -1
            member.failures, member.tried_alone = member.failures + 1, not first
            pause = min(FIRST_PAUSE_S * 2.0 ** min(member.failures - 2, 30), LONGEST_PAUSE_S)
            member.retry_at = now + max(wait, 0.0 if member.failures == 1 else pause)
            if not again and not self._closed:
                text = "generation server %s is excluded until it receives new weights: %s"
                log.warning(text, member.server.name, reason)
            if first:
                member.lost_at = now
                self._first_loss = self._first_loss or f"{member.server.name}: {reason}"
                if all(other.reason for other in self._members):
                    self._alone_since = now
                    for other in self._members:
                        other.tried_alone, other.retry_at = False, min(other.retry_at, now + FIRST_PAUSE_S)
                    text = "no generation server is left; waiting up to %g s for one (rollout.server_wait_s)"
                    log.warning(text, self._cfg.server_wait_s)
            self._changed.notify_all()
