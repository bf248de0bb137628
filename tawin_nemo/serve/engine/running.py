"""The jobs in the engine: which lane each runs in, what has come in of it, and the steps that they share."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tawin_nemo.rollout.scoring import best, one_prompt
from tawin_nemo.serve.engine.jobs import Done, Hit, Job, Ran, Rejected
from tawin_nemo.serve.engine.messages import Admit, Advance, Draw, Drop, Lane
from tawin_nemo.serve.engine.metrics import Metrics
from tawin_nemo.serve.engine.ranks import Leader
from tawin_nemo.serve.engine.replica import FILTER_KINDS, no_places
from tawin_nemo.types import Candidates, TokenRows, moved
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


@dataclass(eq=False)
class _Entry:
    """A job in a lane; ``came`` by the place of the prompt."""

    job: Job
    lane: Lane
    tickets: list[int]
    came: dict[int, Ran] = field(default_factory=dict)


class Running:
    """Touched by the engine's thread only, except for ``jobs``, which others may count."""

    def __init__(self, leader: Leader, metrics: Metrics) -> None:
        self._leader, self._metrics = leader, metrics
        self._entries: dict[Job, _Entry] = {}
        self._of_ticket: dict[int, _Entry] = {}
        self._next_ticket = 0

    @property
    def jobs(self) -> list[Job]:
        return list(self._entries)

    @property
    def weights(self) -> set[int]:
        """Versions that something runs on."""
        return {entry.lane.weights for entry in list(self._entries.values())}

    @property
    def rows(self) -> int:
        """Beams that may be running at once."""
        return sum(entry.job.rows for entry in self._entries.values())

    def cost(self, job: Job, weights: int) -> int:
        """Tokens of the cache that a job may come to."""
        lane, width = _lane(job, weights), max(job.width, job.draws)
        return sum(self._leader.replica.cost(lane, int(length), width) for length in job.prompts.lengths)

    def drop_unwanted(self) -> None:
        """Jobs that were cancelled or are past their deadline leave at once."""
        now = time.monotonic()
        for entry in list(self._entries.values()):
            job = entry.job
            if not (job.cancelled or now >= job.deadline):
                continue
            self._leader.apply(Drop(entry.lane, np.array(entry.tickets, dtype=np.int64)))
            self._leave(entry)
            reason = "aborted" if job.cancelled else "deadline"
            job.fail(Rejected(reason, "the deadline passed" if reason == "deadline" else "the request was given up"))

    def begin(self, jobs: Sequence[Job], weights: int) -> None:
        """Let jobs join: one admission per lane; draws are made on the spot."""
        lanes: dict[Lane, list[Job]] = defaultdict(list)
        for job in jobs:
            job.started = time.monotonic()
            self._metrics.seconds.labels("queue").observe(job.started - job.arrived)
            self._metrics.tokens.labels("prompt").inc(len(job.prompts.flat))
            if job.draws:
                self._draw(job, _lane(job, weights))
            else:
                lanes[_lane(job, weights)].append(job)
        for lane, members in lanes.items():
            with self._metrics.seconds.labels("admit").time():
                self._admit(lane, members)

    def _admit(self, lane: Lane, jobs: list[Job]) -> None:
        entries = []
        for job in jobs:
            tickets = list(range(self._next_ticket, self._next_ticket + len(job.prompts)))
            self._next_ticket += len(tickets)
            entry = _Entry(job, lane, tickets)
            self._entries[job] = entry
            self._of_ticket.update(dict.fromkeys(tickets, entry))
            entries.append(entry)
        sizes = [len(job.prompts) for job in jobs]
        kinds = [FILTER_KINDS.index("" if job.filter is None else job.filter.kind) for job in jobs]
        listed = [no_places() if job.filter is None else job.filter.place_M for job in jobs]
        order = Admit(
            lane,
            TokenRows.from_lists([job.prompts[row] for job in jobs for row in range(len(job.prompts))]),
            np.array([ticket for entry in entries for ticket in entry.tickets], dtype=np.int64),
            np.repeat([job.width for job in jobs], sizes),
            np.repeat(kinds, sizes),
            TokenRows.from_lists([places for places, size in zip(listed, sizes, strict=True) for _ in range(size)]),
        )
        try:
            self._leader.apply(order)
        except Exception as error:
            self._lane_failed(lane, error)

    def _draw(self, job: Job, lane: Lane) -> None:
        seeds = np.array(job.seeds, dtype=np.int64)
        try:
            with self._metrics.seconds.labels("draw").time():
                found = self._leader.apply(Draw(lane, job.prompts, seeds, job.draws, job.temperature))
        except Exception as error:
            if self._leader.ranks.size > 1:
                raise
            log.exception("draws failed")
            job.fail(Rejected("fault", f"the engine failed: {type(error).__name__}"))
            return
        self._finish(job, lane, [_ran(job, found, row) for row in range(len(job.prompts))])

    def advance(self) -> None:
        """One model call for every lane."""
        self._show()
        for lane in list(dict.fromkeys(entry.lane for entry in self._entries.values())):
            members = [entry for entry in self._entries.values() if entry.lane == lane]
            self._metrics.sharing.observe(len(members))
            self._metrics.step_rows.observe(sum(entry.job.rows for entry in members))
            try:
                with self._metrics.seconds.labels("step").time():
                    answers = self._leader.apply(Advance(lane))
            except Exception as error:
                self._lane_failed(lane, error)
                continue
            for row, ticket in enumerate(answers.ticket_B.tolist()):
                entry = self._of_ticket[ticket]
                entry.came[entry.tickets.index(ticket)] = _ran(
                    entry.job, answers.found, row, float(answers.lost_B[row])
                )
                if len(entry.came) == len(entry.tickets):
                    self._leave(entry)
                    self._finish(entry.job, lane, [entry.came[place] for place in range(len(entry.tickets))])

        self._show()

    def _show(self) -> None:
        self._metrics.running.set(len(self._entries))
        self._metrics.beams.set(self.rows)
        self._metrics.held.set(self._leader.replica.held())

    def _finish(self, job: Job, lane: Lane, prompts: list[Ran]) -> None:
        now = time.monotonic()
        self._metrics.seconds.labels("run").observe(now - job.started)
        choices_V = job.catalog.trie.spans.choices_V
        for ran in prompts:
            tokens = sum(len(hit.tokens) for hit in ran.hits)
            leaf_N = np.array([hit.leaf for hit in ran.hits], dtype=np.int64)
            if ran.found is not None:
                tokens, leaf_N = int(ran.found.lengths_BW.sum()), ran.found.leaf_BW[ran.found.leaf_BW >= 0].numpy()
            self._metrics.tokens.labels("answer").inc(tokens)
            self._metrics.tokens.labels("forced").inc(tokens - int(choices_V[leaf_N].sum()))
        job.finish(Done(prompts, lane.weights, lane.catalog, job.started - job.arrived, now - job.started))

    def _leave(self, entry: _Entry) -> None:
        del self._entries[entry.job]
        for ticket in entry.tickets:
            del self._of_ticket[ticket]

    def _lane_failed(self, lane: Lane, error: Exception) -> None:
        """Jobs of the lane end with an error; with other ranks beside, whose state is unknown, the engine does."""
        if self._leader.ranks.size > 1:
            raise error
        log.error("a search failed and its requests with it", exc_info=error)
        for entry in [entry for entry in self._entries.values() if entry.lane == lane]:
            self._leave(entry)
            entry.job.fail(Rejected("fault", f"the engine failed: {type(error).__name__}"))
        self._leader.apply(Drop(lane, None))


def _lane(job: Job, weights: int) -> Lane:
    return Lane(weights, job.catalog.version, job.space)


def _ran(job: Job, found: Candidates, row: int, lost: float = -math.inf) -> Ran:
    """The real candidates of one prompt as plain numbers, or its row as it is."""
    if job.arrays:
        places = job.draws or job.width  # the rest are those of wider prompts beside it
        return Ran([], lost, moved(best(one_prompt(found, row), places), "cpu"))
    leaves, lengths = found.leaf_BW[row].tolist(), found.lengths_BW[row].tolist()
    scores, tokens = found.scores_BW[row].tolist(), found.tokens_BWT[row].tolist()
    logprobs = found.logprobs_BWT[row].tolist()
    hits = [
        Hit(leaf, scores[place], tokens[place][: lengths[place]], logprobs[place][: lengths[place]])
        for place, leaf in enumerate(leaves)
        if leaf >= 0
    ]
    return Ran(hits, lost)
