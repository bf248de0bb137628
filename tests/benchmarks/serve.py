"""The generation server against a server around transformers: requests a second, latency, swaps under load.

    python -m tests.benchmarks.serve [--short]

Ours is ``tawin-nemo serve`` in a process of its own. The baseline is FastAPI and uvicorn around transformers'
``generate(num_beams, prefix_allowed_tokens_fn, renormalize_logits=True)`` (``serve_baseline``), once behind a lock and once
with dynamic batching; the better one at each concurrency is what ours is compared with. The load comes from a process of its
own (``load``). Model: small-1m with random weights over the semantic IDs of the complete Industrial catalogue; prompts: test
histories. Before anything is timed both sides must return the same items and scores; every reply under swaps is compared
with what transformers gives for the versions that it names.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tawin_nemo.models.megatron.lm import MegatronLM
from tawin_nemo.rollout.beam import constrained_beam_search
from tawin_nemo.rollout.metered import MeteredLM
from tawin_nemo.types import TokenRows
from tests.benchmarks import harness, serve_swaps
from tests.benchmarks.load import Load, Spec, load
from tests.benchmarks.serve_baseline import write_parts
from tests.benchmarks.serve_oracle import SCORE_TOLERANCE
from tests.benchmarks.serve_swaps import Answers
from tests.benchmarks.serving import (
    Served,
    Setting,
    answers,
    industrial,
    process,
    server,
    temporary_folder,
    wait_for,
)
from tests.benchmarks.setting import megatron_model, start, transformers_model

CONCURRENCY = (1, 8, 64)
GOAL, LATENCY_GOAL, TAIL_GOAL, PAUSE_GOAL = 8.0, 1.0, 2.0, 50.0
#: Share of our own largest throughput at which the tail is measured.
LOADED = 0.7
CHECKED = 48  # bodies whose right answers are computed
UNFAIR = [
    "transformers runs every prompt once per beam and the whole vocabulary's head at every step; with 782 tokens and prompts of "
    "some 30 tokens that costs little here, so a real model and vocabulary would set the two further apart",
    "a model of 1M parameters: much of what is timed on both sides is Python and HTTP, not arithmetic",
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

    @classmethod
    def of(cls, *, short: bool) -> Sizes:
        return cls(1.0, 1, 32, 2, 20_000) if short else cls(6.0, 3, 256, 6, 1_000_000)


@contextlib.contextmanager
def baseline(setting: Setting, batch: int, threads: int) -> Iterator[str]:
    """Address of the server around transformers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", setting.run_dir / f"baseline_{batch}.log"
    words = ["tests.benchmarks.serve_baseline", str(setting.run_dir), "--port", str(port)]
    words += ["--batch", str(batch), "--threads", str(threads)]
    with process(words, log, threads) as started:
        wait_for(lambda: answers(url), started, log)
        yield url


def asked(setting: Setting, count: int, beams: int) -> list[dict[str, Any]]:
    histories = [history for history in setting.histories if history][:count]
    return [{"history": history, "n": 10, "beams": beams} for history in histories]


def agreement(urls: dict[str, str], bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of the ranks at which both sides have the same item, and the largest difference of scores."""
    found = {
        name: [httpx.post(f"{url}/v1/recommendations", json=body, timeout=120).raise_for_status().json()["items"]
               for body in bodies]
        for name, url in urls.items()
    }  # fmt: skip
    same, apart = [], 0.0
    for name in list(urls)[1:]:
        for one, other in zip(found["ours"], found[name], strict=True):
            assert len(one) == len(other)
            same += [a["item"] == b["item"] for a, b in zip(one, other, strict=True)]
            apart = max([apart, *(abs(a["score"] - b["score"]) for a, b in zip(one, other, strict=True))])
    return {"ranks": len(same), "same item": float(np.mean(same)), "largest score difference": harness.rounded(apart),
            "identical": bool(np.mean(same) == 1.0 and apart <= SCORE_TOLERANCE)}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """All rounds of one side at one concurrency."""

    side: str
    concurrency: int
    loads: list[Load]

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
            "load's core": harness.rounded(float(np.median([found.core for found in self.loads]))),
        }  # fmt: skip


def measured(urls: dict[str, str], bodies: list[dict[str, Any]], sizes: Sizes) -> list[Point]:
    """Closed loops of all sides in turn, at every concurrency."""
    points = []
    for concurrency in CONCURRENCY:
        found: dict[str, list[Load]] = {name: [] for name in urls}
        for number in range(sizes.rounds):
            for name, url in urls.items():
                spec = Spec(url, bodies, sizes.seconds, concurrency, first=number * 17, keep=False)
                found[name].append(load(spec))
        points += [Point(name, concurrency, loads) for name, loads in found.items()]
    return points


def throughput(report: harness.Report, points: Sequence[Point]) -> tuple[float, float]:
    """Rows and targets of the closed loops; seconds per request of ours and of the better baseline at 8."""
    report.rows += [point.row() for point in points]
    at = {(point.side, point.concurrency): point for point in points}
    others = [side for side in dict.fromkeys(point.side for point in points) if side != "ours"]
    fastest = max((at[side, 8] for side in others), key=lambda point: point.per_second)
    quickest = min((at[side, 1] for side in others), key=lambda point: point.latency(0.5))
    ours = at["ours", 8]
    report.settings["baseline at 8"], report.settings["baseline at 1"] = fastest.side, quickest.side
    report.targets["requests/s at 8, times the baseline"] = harness.Target.at_least(
        GOAL, ours.per_second / fastest.per_second
    )
    report.targets["p50 at 1, of the baseline's"] = harness.Target.at_most(
        LATENCY_GOAL, at["ours", 1].latency(0.5) / quickest.latency(0.5)
    )
    return 1 / ours.per_second, 1 / fastest.per_second


def tail(report: harness.Report, url: str, bodies: list[dict[str, Any]], most: float, sizes: Sizes) -> None:
    """Poisson arrivals at a share of the largest throughput."""
    spec = Spec(url, bodies, 3 * sizes.seconds, 256, rate=LOADED * most, keep=False)
    point = Point(f"ours, open loop, {LOADED:.0%} of the most", 256, [load(spec)])
    report.rows.append(point.row())
    report.targets["p99 / p50, open loop"] = harness.Target.at_most(TAIL_GOAL, point.latency(0.99) / point.latency(0.5))


def swaps(report: harness.Report, served: Served, setting: Setting, bodies: list[dict[str, Any]], sizes: Sizes) -> None:
    """Weights, then the catalogue, swapped under a closed loop of 8."""
    bodies = bodies[:CHECKED]
    catalogue, compute = setting.catalogue, partial(serve_swaps.rankings, bodies=bodies)
    expected = {name: compute(catalogue, setting.weights[place]) for place, name in enumerate(("first", "second"))}
    names = serve_swaps.removed_items(expected["first"])
    fewer = catalogue.changed([], names, 2)
    expected["fewer"] = compute(fewer, setting.weights[0])
    every = 1.5
    spec = Spec(served.data, bodies, every * sizes.swaps + 1, 8)
    calm, _ = serve_swaps.watched(spec, 0, None, every)
    changes = {
        "weights": (serve_swaps.weight_swap(served, setting), ("second", "first")),
        "catalogue": (serve_swaps.catalogue_swap(served, catalogue, names), ("fewer", "first")),
    }
    failed, mixed, replies = calm.failed, 0, 0
    for kind, (swap, states) in changes.items():
        before = served.client().models()
        found, made = serve_swaps.watched(spec, sizes.swaps, swap, every)
        right = Answers(expected, {(before.weight_version, before.catalogue_version): "first"})
        right.state_of |= {(m.weight_version, m.catalogue_version): states[n % 2] for n, m in enumerate(made)}
        row = serve_swaps.pauses(calm, found, made)
        wrong = sum(right.wrong(reply) for reply in found.replies if reply.status == 200)
        report.rows.append({"side": f"swap of the {kind}", "failed": found.failed, "mixed": wrong} | shown(row))
        added = max(row["added gap ms"], row["added latency ms"])
        report.targets[f"added pause ms, {kind}"] = harness.Target.at_most(PAUSE_GOAL, added)
        failed, mixed, replies = failed + found.failed, mixed + wrong, replies + len(found.replies)
    report.checks["swaps"] = {
        "replies compared": replies,
        "bodies that tell the weights apart": serve_swaps.differing(expected["first"], expected["second"]),
        "bodies that tell the catalogues apart": serve_swaps.differing(expected["first"], expected["fewer"]),
    }
    report.targets["failed under swaps"] = harness.Target.at_most(0, failed)
    report.targets["wrong for their versions"] = harness.Target.at_most(0, mixed)


def growth(report: harness.Report, served: Served, setting: Setting, bodies: list[dict[str, Any]], sizes: Sizes) -> None:
    """A catalogue of a million items, built, validated and activated under a closed loop of 8."""
    path = setting.run_dir / "items.jsonl"
    serve_swaps.write_items(setting.catalogue, path, sizes.items)
    found, phases = serve_swaps.activation(served, path, Spec(served.data, bodies, 900, 8, keep=False))
    row = serve_swaps.activation_row(found, phases)
    report.rows.append({"side": f"catalogue of {sizes.items:,} items", "failed": found.failed} | shown(row))
    added = row["activate, slowest ms"] - max(row["calm, slowest ms"], row["between, slowest ms"])
    report.targets[f"added latency ms, activation of {sizes.items:,}"] = harness.Target.at_most(PAUSE_GOAL, added)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: harness.rounded(value) if isinstance(value, float) else value for name, value in row.items()}


def floor_seconds(setting: Setting, bodies: Sequence[dict[str, Any]], machine: harness.Machine) -> float:
    """What the operations of one request need at this machine's rate of matrix products."""
    shape = setting.shape
    lm = MeteredLM(MegatronLM(megatron_model(shape, transformers_model(shape)), shape))
    prompts = TokenRows.from_lists([setting.catalogue.prompt(body["history"]).flat for body in bodies])
    constrained_beam_search(lm, prompts, setting.catalogue.trie, bodies[0]["beams"])
    return machine.floor_seconds(flops=lm.take().forward_flops(shape)) / len(bodies)


def benchmark(folder: Path, given: Any, machine: harness.Machine) -> tuple[harness.Report, dict[str, float]]:
    sizes = Sizes.of(short=given.short)
    if given.items:
        sizes = replace(sizes, items=given.items)
    setting = industrial(folder)
    bodies = asked(setting, sizes.bodies, given.beams)
    lengths = [len(setting.catalogue.prompt(body["history"]).flat) for body in bodies]
    report = harness.Report(
        "serve", machine,
        shapes={**setting.facts, "beams": given.beams, "n": 10, "histories": len(bodies),
                "prompt_tokens": [int(q) for q in np.percentile(lengths, [5, 50, 95])]},
        settings={"dtype": "fp32", "batch": given.batch, "seconds": sizes.seconds, "rounds": sizes.rounds},
        unfair=UNFAIR,
    )  # fmt: skip
    write_parts(setting.run_dir, setting.catalogue, setting.weights[0])
    threads = given.threads
    with server(setting, threads=threads) as served:
        with baseline(setting, 1, threads) as locked, baseline(setting, given.batch, threads) as batched:
            urls = {"ours": served.data, "transformers, one by one": locked, "transformers, batches": batched}
            report.checks["answers"] = agreement(urls, bodies[:CHECKED])
            assert report.checks["answers"]["same item"] > 0.99, report.checks
            points = measured(urls, bodies, sizes)
        ours, theirs = throughput(report, points)
        tail(report, served.data, bodies, max(p.per_second for p in points if p.side == "ours"), sizes)
        swaps(report, served, setting, bodies, sizes)
        growth(report, served, setting, bodies, sizes)
    return report, {"ours": ours, "baseline": theirs, "floor": floor_seconds(setting, bodies, machine)}


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--short", action="store_true", help="a minute or two, to see that it runs; no figures to quote")
    options.add_argument("--beams", type=int, default=16)
    options.add_argument("--batch", type=int, default=16, help="most prompts of the baseline's batches")
    options.add_argument("--items", type=int, default=0, help="items of the large catalogue (default: a million)")
    options.set_defaults(threads=1)  # the load and the event loops need the other core
    given = options.parse_args()
    start(given.threads)
    machine = harness.this_machine()
    with temporary_folder() as folder:
        report, seconds = benchmark(folder, given, machine)
    report.finish(**seconds, json_file=given.json)


if __name__ == "__main__":
    main()
