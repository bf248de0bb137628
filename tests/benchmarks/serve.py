"""The generation server against a server around transformers: requests a second, latency, swaps under load.

    python -m tests.benchmarks.serve [--titles] [--short]

Ours is ``tawin-nemo serve`` in a process of its own. The baseline is FastAPI and uvicorn around transformers'
``generate(num_beams, prefix_allowed_tokens_fn, renormalize_logits=True)`` (``serve_baseline``), once behind a lock and
once with dynamic batching; ours is compared with the better one at each concurrency. The load comes from a process of
its own (``load``). Model: small-1m with random weights over the semantic IDs of the complete Industrial catalog; with
``--titles`` that of the model benchmarks, Qwen2.5-0.5B with 4 layers over titles, and throughput only. Prompts: test
histories. Before anything is timed both sides must return the same items and scores; every reply under swaps is
compared with what transformers gives for the versions that it names.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.rollout.beam import constrained_beam_search
from tawin_nemo.rollout.lm import MeteredLM
from tawin_nemo.types import TokenRows
from tests.benchmarks import harness, serve_swaps
from tests.benchmarks.load import Load, Spec, load
from tests.benchmarks.serve_baseline import write_parts
from tests.benchmarks.serve_oracle import SCORE_TOLERANCE
from tests.benchmarks.serving import (
    Setting,
    answers,
    cpu_seconds,
    industrial,
    process,
    server,
    temporary_folder,
    titles,
    wait_for,
)
from tests.benchmarks.setting import LAYERS, megatron_model, start, transformers_model

CONCURRENCY = (1, 8, 64)
GOAL, LATENCY_GOAL, TAIL_GOAL = 8.0, 1.0, 2.0
#: Share of our own largest throughput at which the tail is measured.
LOADED = 0.7
OURS = "ours"
CHECKED = 48  # bodies whose right answers are computed
UNFAIR_TITLES = [
    "transformers runs every prompt once per beam and walks token by token to the end of the longest living title, "
    "the whole vocabulary's head at every step: this is the method, but with jump-forward decoding it would be faster",
    "64 clients are measured with --full only: 64 requests of the baseline take minutes",
    "with 4 of 24 layers the vocabulary-wide head, which ours never multiplies, weighs more than in the whole model",
]
UNFAIR_SID = [
    "transformers runs every prompt once per beam and the whole vocabulary's head at every step; with 782 tokens and "
    "prompts of some 30 that costs little, so a real model and vocabulary set the two further apart (--titles)",
    "a model of 1M parameters: much of what is timed on both sides is Python and HTTP, not arithmetic",
]
UNFAIR = [
    "the baseline has no limits, filters, versions, keys, metrics or log; ours pays for all of them in every request",
    "server and load share this machine's cores; `load's core` says how much of one the load takes",
]


@dataclass(frozen=True)
class Sizes:
    """How much is run: ``seconds`` of one load, ``rounds`` of all sides in turn."""

    seconds: float
    rounds: int
    bodies: int
    swaps: int
    items: int
    clients: tuple[int, ...] = CONCURRENCY

    @classmethod
    def of(cls, given: argparse.Namespace) -> Sizes:
        found = cls(1.0, 1, 32, 2, 20_000) if given.short else cls(6.0, 3, 256, 6, 1_000_000)
        if given.titles:  # the baseline takes seconds for a request
            clients = CONCURRENCY if given.full else CONCURRENCY[:-1]
            found = replace(found, seconds=2.0 if given.short else 30.0, rounds=1, clients=clients)
        return replace(found, items=given.items or found.items)


@dataclass(frozen=True)
class Side:
    """One of the servers that are compared."""

    name: str
    url: str
    pid: int


@contextlib.contextmanager
def baseline(setting: Setting, batch: int, threads: int) -> Iterator[Side]:
    """The server around transformers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", setting.run_dir / f"baseline_{batch}.log"
    words = ["tests.benchmarks.serve_baseline", str(setting.run_dir), "--port", str(port)]
    words += ["--batch", str(batch), "--threads", str(threads)]
    with process(words, log, threads) as started:
        wait_for(lambda: answers(url), started, log)
        yield Side("transformers, one by one" if batch == 1 else f"transformers, batches of {batch}", url, started.pid)


def asked(setting: Setting, count: int, beams: int) -> list[dict[str, Any]]:
    histories = [history for history in setting.histories if history][:count]
    return [{"history": history, "n": 10, "beams": beams} for history in histories]


def agreement(sides: Sequence[Side], bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of the ranks at which both sides have the same item, and the largest difference of scores."""
    found = {}
    for side in sides:
        with httpx.Client(base_url=side.url, timeout=300) as http:
            replies = [http.post("/v1/recommendations", json=body).raise_for_status() for body in bodies]
        found[side.name] = [reply.json()["items"] for reply in replies]
    same, apart = [], 0.0
    for name in [side.name for side in sides[1:]]:
        for one, other in zip(found[OURS], found[name], strict=True):
            assert len(one) == len(other)
            same += [a["item"] == b["item"] for a, b in zip(one, other, strict=True)]
            apart = max([apart, *(abs(a["score"] - b["score"]) for a, b in zip(one, other, strict=True))])
    return {"ranks": len(same), "same item": float(np.mean(same)), "largest score difference": harness.rounded(apart),
            "identical": bool(np.mean(same) == 1.0 and apart <= SCORE_TOLERANCE)}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """All rounds of one side at one concurrency; ``cpu_seconds`` of its server in all of them, warm-up included."""

    side: str
    concurrency: int
    loads: list[Load]
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        return float(np.median([found.per_second for found in self.loads]))

    def latency(self, share: float) -> float:
        return float(np.median([found.latency(share) for found in self.loads]))

    def row(self) -> dict[str, Any]:
        return {
            "side": self.side, "concurrency": self.concurrency, "requests/s": harness.rounded(self.per_second),
            "p50 ms": harness.rounded(1e3 * self.latency(0.5)), "p99 ms": harness.rounded(1e3 * self.latency(0.99)),
            "failed": sum(found.failed for found in self.loads),
            "server's CPU ms per request": harness.rounded(
                1e3 * self.cpu_seconds / sum(found.seconds * found.per_second + found.warm for found in self.loads)
            ),
            "load's core": harness.rounded(float(np.median([found.core for found in self.loads]))),
        }  # fmt: skip


def measured(sides: Sequence[Side], bodies: list[dict[str, Any]], sizes: Sizes) -> list[Point]:
    """Closed loops of all sides in turn, at every concurrency."""
    points = []
    for clients in sizes.clients:
        found: dict[str, list[Load]] = {side.name: [] for side in sides}
        used = dict.fromkeys(found, 0.0)
        for number in range(sizes.rounds):
            for side in sides:
                before = cpu_seconds(side.pid)
                spec = Spec(side.url, bodies, sizes.seconds, clients, first=number * 17, keep=False)
                found[side.name].append(load(spec))
                used[side.name] += cpu_seconds(side.pid) - before
        points += [Point(name, clients, loads, used[name]) for name, loads in found.items()]
    return points


def throughput(report: harness.Report, points: Sequence[Point]) -> tuple[float, float]:
    """Rows and targets of the closed loops; seconds per request of ours and of the better baseline at 8."""
    report.rows += [point.row() for point in points]
    at = {(point.side, point.concurrency): point for point in points}
    others = [side for side in dict.fromkeys(point.side for point in points) if side != OURS]
    fastest = max((at[side, 8] for side in others), key=lambda point: point.per_second)
    quickest = min((at[side, 1] for side in others), key=lambda point: point.latency(0.5))
    ours = at[OURS, 8]
    report.settings["baseline at 8"], report.settings["baseline at 1"] = fastest.side, quickest.side
    report.targets["requests/s at 8, times the baseline"] = harness.Target.at_least(
        GOAL, ours.per_second / fastest.per_second
    )
    report.targets["p50 at 1, of the baseline's"] = harness.Target.at_most(
        LATENCY_GOAL, at[OURS, 1].latency(0.5) / quickest.latency(0.5)
    )
    return 1 / ours.per_second, 1 / fastest.per_second


def tail(report: harness.Report, side: Side, bodies: list[dict[str, Any]], most: float, sizes: Sizes) -> None:
    """Poisson arrivals at a share of the largest throughput."""
    before = cpu_seconds(side.pid)
    found = load(Spec(side.url, bodies, 3 * sizes.seconds, 256, rate=LOADED * most, keep=False))
    point = Point(f"ours, open loop, {LOADED:.0%} of the most", 256, [found], cpu_seconds(side.pid) - before)
    report.rows.append(point.row())
    report.targets["p99 / p50, open loop"] = harness.Target.at_most(TAIL_GOAL, point.latency(0.99) / point.latency(0.5))


def floor_seconds(setting: Setting, bodies: Sequence[dict[str, Any]], machine: harness.Machine) -> float:
    """What the operations of one request need at this machine's rate of matrix products."""
    shape = setting.shape
    lm = MeteredLM(MegatronLM(megatron_model(shape, transformers_model(shape)), shape))
    prompts = TokenRows.from_lists([setting.catalog.prompt(body["history"]).flat for body in bodies])
    constrained_beam_search(lm, prompts, setting.catalog.trie, bodies[0]["beams"])
    return machine.floor_seconds(flops=lm.pop_flops().forward_flops(shape)) / len(bodies)


def benchmark(
    folder: Path, given: argparse.Namespace, machine: harness.Machine
) -> tuple[harness.Report, dict[str, float]]:
    sizes, threads = Sizes.of(given), given.threads
    setting = titles(folder, layers=given.layers) if given.titles else industrial(folder)
    bodies = asked(setting, sizes.bodies, given.beams)
    lengths = [len(setting.catalog.prompt(body["history"]).flat) for body in bodies]
    report = harness.Report(
        "serve", machine,
        shapes={**setting.facts, "beams": given.beams, "n": 10, "histories": len(bodies),
                "prompt_tokens": [int(q) for q in np.percentile(lengths, [5, 50, 95])]},
        settings={"dtype": "fp32", "seconds": sizes.seconds, "rounds": sizes.rounds},
        unfair=[*(UNFAIR_TITLES if given.titles else UNFAIR_SID), *UNFAIR],
    )  # fmt: skip
    write_parts(setting.run_dir, setting.catalog, setting.weights[0])
    with server(setting, "serve.deadline_s=600", threads=threads) as served:
        ours = Side(OURS, served.data, served.pid)
        with baseline(setting, 1, threads) as locked, baseline(setting, given.batch, threads) as batched:
            sides = [ours, locked, batched]
            report.checks["answers"] = agreement(sides, bodies[: 4 if given.titles else CHECKED])
            assert report.checks["answers"]["same item"] > 0.99, report.checks
            points = measured(sides, bodies, sizes)
        each, theirs = throughput(report, points)
        tail(report, ours, bodies, max(p.per_second for p in points if p.side == OURS), sizes)
        if not given.titles:
            serve_swaps.swaps(report, served, setting, bodies[:CHECKED], sizes.swaps)
            serve_swaps.growth(report, served, setting, bodies, sizes.items)
    return report, {"ours": each, "baseline": theirs, "floor": floor_seconds(setting, bodies, machine)}


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--titles", action="store_true", help="a real vocabulary and titles; throughput only")
    options.add_argument("--layers", type=int, default=LAYERS, help="of the model of --titles")
    options.add_argument(
        "--short", action="store_true", help="a minute or two, to see that it runs; no figures to quote"
    )
    options.add_argument("--beams", type=int, default=16)
    options.add_argument("--batch", type=int, default=16, help="most prompts of the baseline's batches")
    options.add_argument("--items", type=int, default=0, help="items of the large catalog (default: a million)")
    options.set_defaults(threads=1)  # the load and the event loops need the other core
    given = options.parse_args()
    start(given.threads)
    machine = harness.this_machine()
    with temporary_folder() as folder:
        report, seconds = benchmark(folder, given, machine)
    report.finish(**seconds, json_file=given.json)


if __name__ == "__main__":
    main()
