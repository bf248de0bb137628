"""The running jobs: their batches, their partial results, and the decoding steps that they share.

A *lane* (``messages.Lane``) is a batch of jobs with the same weights, catalog and score space, which share model calls.
A *ticket* is the id of one prompt in a lane's search. B: prompts; W: candidates; T: tokens; M: items of a filter;
V: nodes of the trie; N: paths.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tawin_nemo.serve.engine.jobs import Hit, Job, JobResult, PromptResult, Rejected
from tawin_nemo.serve.engine.messages import Admit, Advance, Draw, Drop, Lane
from tawin_nemo.serve.engine.ranks import Leader
from tawin_nemo.serve.engine.replica import FILTER_KINDS, no_items
from tawin_nemo.serve.engine.telemetry import Metrics
from tawin_nemo.types import Candidates, TokenRows
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


@dataclass(eq=False)
class _Entry:
    """A running job, the ticket of each of its prompts, and the finished prompts' results by prompt index."""

    job: Job
    lane: Lane
    tickets: list[int]
    results: dict[int, PromptResult] = field(default_factory=dict)


class Running:
    """All running jobs of an engine. Only the engine's thread may call it; other threads may read ``jobs``."""

    def __init__(self, leader: Leader, metrics: Metrics) -> None:
        self._leader, self._metrics = leader, metrics
        self._entries: dict[Job, _Entry] = {}
        self._of_ticket: dict[int, _Entry] = {}
        self._next_ticket = 0

    @property
    def jobs(self) -> list[Job]:
        """The running jobs in the order of their start."""
        return list(self._entries)

    @property
    def weights(self) -> set[int]:
        """The weight versions that running jobs use."""
        return {entry.lane.weights for entry in list(self._entries.values())}

    @property
    def rows(self) -> int:
        """The largest number of beam rows that the running jobs occupy at once."""
        return sum(entry.job.rows for entry in self._entries.values())

    def cost(self, job: Job, weights: int) -> int:
        """The largest number of KV-cache tokens that a job needs with these weights."""
        lane, width = _lane(job, weights), max(job.width, job.draws)
        return sum(self._leader.replica.cost(lane, int(length), width) for length in job.prompts.lengths)

    def drop_unwanted(self) -> None:
        """End the jobs that were cancelled or are past their deadline, and free their cache."""
        now = time.monotonic()
        for entry in list(self._entries.values()):
            job = entry.job
            if not (job.cancelled or now >= job.deadline):
                continue
            self._leader.apply(Drop(entry.lane, np.array(entry.tickets, dtype=np.int64)))
            self._remove(entry)
            reason = "aborted" if job.cancelled else "deadline"
            job.fail(Rejected(reason, "the deadline passed" if reason == "deadline" else "the request was aborted"))

    def begin(self, jobs: Sequence[Job], weights: int) -> None:
        """Start jobs with these weights: one admission per lane; draws run to their end at once."""
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
        listed = [no_items() if job.filter is None else job.filter.rank_M for job in jobs]
        command = Admit(
            lane,
            TokenRows.from_lists([job.prompts[row] for job in jobs for row in range(len(job.prompts))]),
            np.array([ticket for entry in entries for ticket in entry.tickets], dtype=np.int64),
            np.repeat([job.width for job in jobs], sizes),
            np.repeat(kinds, sizes),
            TokenRows.from_lists([items for items, size in zip(listed, sizes, strict=True) for _ in range(size)]),
        )
        try:
            assist = jobs[0].catalog.assist([job.history for job in jobs for _ in range(len(job.prompts))])
            self._leader.apply(replace(command, assist=assist))
        except Exception as error:
            self._lane_failed(lane, error)

    def _draw(self, job: Job, lane: Lane) -> None:
        seeds = np.array(job.seeds, dtype=np.int64)
        try:
            with self._metrics.seconds.labels("draw").time():
                candidates = self._leader.apply(Draw(lane, job.prompts, seeds, job.draws, job.temperature))
        except Exception as error:
            if self._leader.ranks.size > 1:
                raise
            log.exception("draws failed")
            job.fail(Rejected("fault", f"the engine failed: {type(error).__name__}"))
            return
        self._finish(job, lane, [_result(job, candidates, row) for row in range(len(job.prompts))])

    def advance(self) -> None:
        """Run one model call for every lane and end the jobs whose prompts are all finished."""
        self._update_gauges()
        for lane in list(dict.fromkeys(entry.lane for entry in self._entries.values())):
            members = [entry for entry in self._entries.values() if entry.lane == lane]
            self._metrics.sharing.observe(len(members))
            self._metrics.step_rows.observe(sum(entry.job.rows for entry in members))
            try:
                with self._metrics.seconds.labels("step").time():
                    finished = self._leader.apply(Advance(lane))
            except Exception as error:
                self._lane_failed(lane, error)
                continue
            for row, ticket in enumerate(finished.ticket_B.tolist()):
                entry = self._of_ticket[ticket]
                entry.results[entry.tickets.index(ticket)] = _result(
                    entry.job, finished.candidates, row, float(finished.pruned_score_B[row])
                )
                if len(entry.results) == len(entry.tickets):
                    self._remove(entry)
                    self._finish(entry.job, lane, [entry.results[index] for index in range(len(entry.tickets))])

        self._update_gauges()

    def _update_gauges(self) -> None:
        self._metrics.running.set(len(self._entries))
        self._metrics.beams.set(self.rows)
        self._metrics.held.set(self._leader.replica.held())

    def _finish(self, job: Job, lane: Lane, prompts: list[PromptResult]) -> None:
        now = time.monotonic()
        self._metrics.seconds.labels("run").observe(now - job.started)
        choices_V = job.catalog.trie.spans.choices_V
        for prompt in prompts:
            tokens = sum(len(hit.tokens) for hit in prompt.hits)
            leaf_N = np.array([hit.leaf for hit in prompt.hits], dtype=np.int64)
            if (raw := prompt.candidates) is not None:
                tokens, leaf_N = int(raw.lengths_BW.sum()), raw.leaf_BW[raw.leaf_BW >= 0].numpy()
            self._metrics.tokens.labels("answer").inc(tokens)
            self._metrics.tokens.labels("forced").inc(tokens - int(choices_V[leaf_N].sum()))
        job.finish(JobResult(prompts, lane.weights, lane.catalog, job.started - job.arrived, now - job.started))

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.job]
        for ticket in entry.tickets:
            del self._of_ticket[ticket]

    def _lane_failed(self, lane: Lane, error: Exception) -> None:
        """End the jobs of a lane with an error. With several ranks, whose state is then unknown, the engine ends."""
        if self._leader.ranks.size > 1:
            raise error
        log.error("a search failed and its requests with it", exc_info=error)
        for entry in [entry for entry in self._entries.values() if entry.lane == lane]:
            self._remove(entry)
            entry.job.fail(Rejected("fault", f"the engine failed: {type(error).__name__}"))
        self._leader.apply(Drop(lane, None))


def _lane(job: Job, weights: int) -> Lane:
    return Lane(weights, job.catalog.version, job.space)


def _result(job: Job, candidates: Candidates, row: int, pruned_score: float = -math.inf) -> PromptResult:
    """One prompt's result: hits without padding, or for a job with ``arrays`` its row of the candidates."""
    if job.arrays:
        width = job.draws or job.width  # a row is as wide as the widest prompt of the batch
        return PromptResult([], pruned_score, candidates.map(lambda tensor: tensor[row : row + 1]).top(width).to("cpu"))
    leaves, lengths = candidates.leaf_BW[row].tolist(), candidates.lengths_BW[row].tolist()
    scores, tokens = candidates.scores_BW[row].tolist(), candidates.tokens_BWT[row].tolist()
    logprobs = candidates.logprobs_BWT[row].tolist()
    hits = [
        Hit(leaf, scores[i], tokens[i][: lengths[i]], logprobs[i][: lengths[i]])
        for i, leaf in enumerate(leaves)
        if leaf >= 0
    ]
    return PromptResult(hits, pruned_score)
