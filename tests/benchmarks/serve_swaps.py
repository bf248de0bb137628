"""Swaps of weights and catalogs under load: what they cost those who ask, and whether any reply mixes versions."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tawin_nemo.api.control_schema import ItemToAdd
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tests.benchmarks import harness
from tests.benchmarks.load import Load, Reply, Running, Spec
from tests.benchmarks.serve_baseline import Generator
from tests.benchmarks.serve_oracle import SCORE_TOLERANCE
from tests.benchmarks.serving import Served, Setting

PAUSE_GOAL = 50.0  # ms
#: A thread that builds shares the interpreter with the engine: requests take longer, but none may seem lost.
BUILD_GOAL = 1000.0  # ms
#: Seconds behind a swap that still belong to it.
AFTER = 0.25
REMOVED = 40
#: What one answer has to be: external ids and scores, best first.
Ranking = list[tuple[str, float]]


@dataclass(frozen=True)
class Swap:
    """One change: its times, and what the versions were behind it."""

    begin: float
    end: float
    weight_version: int
    catalog_version: int


@dataclass
class Answers:
    """The right answers of every body under every state; ``state_of`` names the state of a pair of versions."""

    expected: dict[str, list[Ranking]]
    state_of: dict[tuple[int, int], str]

    def wrong(self, reply: Reply) -> bool:
        """Whether a reply is not what the versions that it names give: another score at some rank, or of some item."""
        content = reply.content
        assert content is not None
        state = self.state_of[content["weight_version"], content["catalog_version"]]
        right = self.expected[state][reply.body]
        score_of = dict(right)
        if len(content["items"]) != len(right):
            return True
        return any(
            abs(item["score"] - score) > SCORE_TOLERANCE
            or abs(item["score"] - score_of.get(item["external_id"], item["score"])) > SCORE_TOLERANCE
            for item, (_, score) in zip(content["items"], right, strict=True)
        )


def rankings(catalog: ServedCatalog, weights: Path, bodies: Sequence[dict[str, Any]]) -> list[Ranking]:
    """The right answers by transformers' own beam search."""
    generator, found = Generator.of(catalog, weights), []
    for body in bodies:
        prompt = torch.from_numpy(catalog.prompt(body["history"]).flat)
        (items,) = generator.best([prompt], body["beams"], body["n"])
        found.append([(catalog.external_ids[item], score) for item, score in items])
    return found


def differing(first: Sequence[Ranking], second: Sequence[Ranking]) -> float:
    """Share of the bodies whose right answers tell two states apart."""
    apart = [
        len(one) != len(two) or any(abs(a - b) > SCORE_TOLERANCE for (_, a), (_, b) in zip(one, two, strict=True))
        for one, two in zip(first, second, strict=True)
    ]
    return float(np.mean(apart))


def watched(spec: Spec, swaps: int, swap: Callable[[int], Swap] | None, every: float) -> tuple[Load, list[Swap]]:
    """Run a load and swap ``swaps`` times meanwhile, with ``every`` seconds between two beginnings."""
    running, made = Running(spec), []
    for number in range(swaps if swap is not None else 0):
        time.sleep(max(0.0, running.begun + (number + 0.5) * every - time.monotonic()))
        assert swap is not None
        made.append(swap(number))
    return running.result(), made


def pauses(calm: Load, busy: Load, swaps: Sequence[Swap]) -> dict[str, Any]:
    """Longest gap between replies and slowest request around swaps, against as many windows of the calm run."""
    windows = [(swap.begin, swap.end + AFTER) for swap in swaps]
    shift = min(reply.due for reply in calm.replies) - min(reply.due for reply in busy.replies)
    still = [(begin + shift, end + shift) for begin, end in windows]
    gap = {name: max(side.longest_gap(*at) for at in places) for name, side, places in (
        ("calm", calm, still), ("swaps", busy, windows))}  # fmt: skip
    slow = {name: max(side.slowest(*at) for at in places) for name, side, places in (
        ("calm", calm, still), ("swaps", busy, windows))}  # fmt: skip
    return {
        "swaps": len(swaps), "seconds of one swap": float(np.median([swap.end - swap.begin for swap in swaps])),
        "longest gap ms, calm": 1e3 * gap["calm"], "longest gap ms, swaps": 1e3 * gap["swaps"],
        "slowest ms, calm": 1e3 * slow["calm"], "slowest ms, swaps": 1e3 * slow["swaps"],
        "added gap ms": 1e3 * (gap["swaps"] - gap["calm"]), "added latency ms": 1e3 * (slow["swaps"] - slow["calm"]),
        "requests/s, calm": calm.per_second, "requests/s, swaps": busy.per_second,
    }  # fmt: skip


def weight_swap(served: Served, setting: Setting) -> Callable[[int], Swap]:
    """The two weights in turn."""

    def swap(number: int) -> Swap:
        with served.controller() as control:
            begin = time.monotonic()
            reply = control.update_weights(str(setting.weights[(number + 1) % 2]))
            return Swap(begin, time.monotonic(), reply.weight_version, reply.catalog_version)

    return swap


def removed_items(answers: Sequence[Ranking]) -> list[str]:
    """The items that stand first most often."""
    first = [ranking[0][0] for ranking in answers]
    return sorted(dict.fromkeys(first), key=lambda name: -first.count(name))[:REMOVED]


def catalog_swap(served: Served, catalog: ServedCatalog, names: Sequence[str]) -> Callable[[int], Swap]:
    """Take items out and bring them back, in turn."""
    back = [as_item(catalog, catalog.number_of[name]) for name in names]

    def swap(number: int) -> Swap:
        with served.controller() as control:
            begin = time.monotonic()
            reply = control.change_items(**({"add": back} if number % 2 else {"remove": list(names)}))
            return Swap(begin, time.monotonic(), reply.weight_version, reply.catalog_version)

    return swap


def as_item(catalog: ServedCatalog, number: int) -> ItemToAdd:
    """An item as the control plane takes it."""
    codes = codes_in(catalog.texts[number]) if catalog.prompt_format.template.kind == "sid" else []
    return ItemToAdd(external_id=catalog.external_ids[number], title=catalog.titles[number], codes=codes)


def codes_in(text: str) -> list[str]:
    return re.findall(r"<[^<>]+>", text)


# -- in the benchmark
def swaps(report: harness.Report, served: Served, setting: Setting, bodies: list[dict[str, Any]], count: int) -> None:
    """Weights, then the catalog, swapped under a closed loop of 8."""
    catalog, compute = setting.catalog, partial(rankings, bodies=bodies)
    expected = {name: compute(catalog, setting.weights[place]) for place, name in enumerate(("first", "second"))}
    names = removed_items(expected["first"])
    fewer = catalog.changed([], names, 2)
    expected["fewer"] = compute(fewer, setting.weights[0])
    every = 1.5
    spec = Spec(served.data, bodies, every * count + 1, 8)
    calm, _ = watched(spec, 0, None, every)
    changes = {
        "weights": (weight_swap(served, setting), ("second", "first")),
        "catalogue": (catalog_swap(served, catalog, names), ("fewer", "first")),
    }
    failed, mixed, replies = calm.failed, 0, 0
    for kind, (swap, states) in changes.items():
        before = served.client().models()
        found, made = watched(spec, count, swap, every)
        right = Answers(expected, {(before.weight_version, before.catalog_version): "first"})
        right.state_of |= {(m.weight_version, m.catalog_version): states[n % 2] for n, m in enumerate(made)}
        row = pauses(calm, found, made)
        wrong = sum(right.wrong(reply) for reply in found.replies if reply.status == 200)
        report.rows.append({"side": f"swap of the {kind}", "failed": found.failed, "mixed": wrong} | shown(row))
        added = max(row["added gap ms"], row["added latency ms"])
        report.targets[f"added pause ms, {kind}"] = harness.Target.at_most(PAUSE_GOAL, added)
        failed, mixed, replies = failed + found.failed, mixed + wrong, replies + len(found.replies)
    report.checks["swaps"] = {
        "replies compared": replies,
        "bodies that tell the weights apart": differing(expected["first"], expected["second"]),
        "bodies that tell the catalogs apart": differing(expected["first"], expected["fewer"]),
    }
    report.targets["failed under swaps"] = harness.Target.at_most(0, failed)
    report.targets["wrong for their versions"] = harness.Target.at_most(0, mixed)


def growth(report: harness.Report, served: Served, setting: Setting, bodies: list[dict[str, Any]], items: int) -> None:
    """A catalog of a million items, built, validated and activated under a closed loop of 8."""
    path = setting.run_dir / "items.jsonl"
    write_items(setting.catalog, path, items)
    found, phases = activation(served, path, Spec(served.data, bodies, 900, 8, keep=False))
    row = activation_row(found, phases)
    report.rows.append({"side": f"catalog of {items:,} items", "failed": found.failed} | shown(row))
    added = row["activate, slowest ms"] - max(row["calm, slowest ms"], row["between, slowest ms"])
    report.targets[f"added latency ms, activation of {items:,}"] = harness.Target.at_most(PAUSE_GOAL, added)
    slowest = max(row["build, slowest ms"], row["validate, slowest ms"])
    report.targets[f"slowest request ms, {items:,} being built"] = harness.Target.at_most(BUILD_GOAL, slowest)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: harness.rounded(value) if isinstance(value, float) else value for name, value in row.items()}


# -- a catalog of a million items ------------------------------------------------------------------------------------
def write_items(catalog: ServedCatalog, path: Path, count: int) -> None:
    """JSON lines of the catalog's own items and as many others as are missing, with codes drawn at random."""
    texts = [codes_in(text) for text in catalog.texts]
    levels = [sorted({codes[level] for codes in texts if len(codes) > level}) for level in range(3)]
    taken, rng = {tuple(codes) for codes in texts}, np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for number, codes in enumerate(texts):
            file.write(_line(catalog.external_ids[number], catalog.titles[number], codes))
        number = len(texts)
        while number < count:
            drawn = np.stack([rng.integers(0, len(level), count) for level in levels], axis=1).tolist()
            for places in drawn:
                codes = tuple(level[place] for level, place in zip(levels, places, strict=True))
                if codes in taken or number == count:
                    continue
                taken.add(codes)
                file.write(_line(f"X{number:08}", f"generated item {number}", codes))
                number += 1


def _line(name: str, title: str, codes: Sequence[str]) -> str:
    return json.dumps({"external_id": name, "title": title, "codes": list(codes)}) + "\n"


def activation(served: Served, path: Path, spec: Spec) -> tuple[Load, dict[str, tuple[float, float]]]:
    """Build, validate and activate a catalog under load; when each of the steps ran, and a calm time before them."""
    running = Running(spec)
    with served.controller() as control:
        time.sleep(max(0.0, running.begun + 3 - time.monotonic()))
        marks = [running.begun, time.monotonic()]
        version = control.build_catalog(str(path)).candidate
        marks.append(time.monotonic())
        control.validate_catalog(version)
        marks.append(time.monotonic())
        time.sleep(2)
        marks.append(time.monotonic())
        control.activate_catalog(version)
        marks.append(time.monotonic() + AFTER)
    time.sleep(1)
    names = ("calm", "build", "validate", "between", "activate")
    phases = dict(zip(names, itertools.pairwise(marks), strict=True))
    return running.stop(), phases


def activation_row(found: Load, phases: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Seconds of each step and the slowest request of each, in ms."""
    row: dict[str, Any] = {}
    for name, (begin, end) in phases.items():
        row[f"{name} s"] = end - begin
        row[f"{name}, slowest ms"] = 1e3 * found.slowest(begin, end)
    return row
