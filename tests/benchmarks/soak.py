"""A server under everything at once for minutes: swaps in a loop, good, slow, leaving and mistaken clients.

    python -m tests.benchmarks.soak [--minutes 10] [--json recipes/results/serve_soak.json]

The server and its clients (``soak_load``) are processes of their own; this one swaps weights and catalogs and watches
the server's memory. Afterwards every item of every answer is looked up in the catalog version that the answer names,
and a sample of the answers is computed again under the versions that they name (``serve_oracle``: transformers, no
trie). One JSON object to stdout; exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tawin_nemo.api.client import ControlClient
from tawin_nemo.api.control_schema import ItemToAdd
from tawin_nemo.data.catalog_builder import answer_paths
from tawin_nemo.util.errors import TawinError
from tests.benchmarks import serving, soak_load
from tests.benchmarks.harness import REPOSITORY, _git, _shown_arguments, rounded
from tests.benchmarks.serve_oracle import SCORE_TOLERANCE, Oracle, admissible
from tests.benchmarks.serve_swaps import as_item, codes_in
from tests.benchmarks.serving import Served, Setting
from tests.benchmarks.setting import start

BEAMS, SAMPLE, WEIGHTS, NEW = 12, 400, 3, 60
#: Largest growth of resident memory behind the warm-up; not judged below so many minutes.
GROWTH, JUDGED = 0.05, 4.0
#: Share of the time that is warm-up, and how much of it at each end the memory is the median of.
WARM, ENDS = 0.25, 0.1


@dataclass
class World:
    """What is served when: external ids by catalog version, weights by weight version.

    ``path_of``: tokens of every item that ever may be served; ``fixed`` ones are never removed.
    """

    setting: Setting
    item_of: dict[str, ItemToAdd]
    path_of: dict[str, tuple[int, ...]]
    fixed: frozenset[str]
    live: set[str]
    changes: dict[int, tuple[set[str], set[str]]] = field(default_factory=dict)  # version: added, removed
    weights: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, setting: Setting) -> World:
        catalog = setting.catalog
        first = {name: as_item(catalog, number) for number, name in enumerate(catalog.external_ids)}
        new = _new_items(setting)
        texts = ["".join(item.codes) if item.codes else item.title for item in new]
        paths = answer_paths(texts, catalog.prompt_format.tokenizer, catalog.prompt_format.template)
        path_of = {name: tuple(catalog.paths[number].tolist()) for name, number in catalog.number_of.items()}
        path_of |= {item.external_id: tuple(paths[row].tolist()) for row, item in enumerate(new)}
        items = first | {item.external_id: item for item in new}
        names = list(first)
        return cls(setting, items, path_of, frozenset(names[: len(names) // 2]), set(names), {}, {1: 0})

    def changed(self, version: int, live: set[str]) -> None:
        self.changes[version] = (live - self.live, self.live - live)
        self.live = live


def _new_items(setting: Setting) -> list[ItemToAdd]:
    """Items that the catalog does not have: other mixtures of its codes, or of the words of its titles."""
    catalog, rng = setting.catalog, random.Random(1)
    sid = catalog.prompt_format.template.kind == "sid"
    parts = [codes_in(text) if sid else text.split() for text in catalog.texts]
    taken, made = set(catalog.texts), []
    while len(made) < NEW:
        one, other = rng.choice(parts), rng.choice(parts)
        words = [*one[:2], *other[2:]]
        text = ("" if sid else " ").join(words)
        if len(words) < 3 or text in taken:
            continue
        taken.add(text)
        name = f"NEW{len(made):03}"
        title = f"new item {len(made)}" if sid else text
        made.append(ItemToAdd(external_id=name, title=title, codes=words if sid else []))
    return made


class Operator:
    """Changes weights and catalogs by turns; every answer of the control plane is kept."""

    def __init__(self, world: World, control: ControlClient, seed: int = 0) -> None:
        self._world, self._control, self._rng = world, control, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []
        self._turn = 0

    def step(self) -> None:
        kinds: tuple[Callable[[], None], ...] = (self.weights, self.items, self.items, self.activate, self.items)
        what = kinds[self._turn % len(kinds)]
        self._turn += 1
        try:
            what()
            self.done[what.__name__] += 1
        except (TawinError, httpx.HTTPError) as error:
            self.failed.append(f"{what.__name__}: {error}")

    def weights(self) -> None:
        place = (self.done["weights"] + 1) % WEIGHTS
        reply = self._control.update_weights(str(self._world.setting.weights[place]))
        self._world.weights[reply.weight_version] = place

    def items(self) -> None:
        live, item_of = self._world.live, self._world.item_of
        remove = self._rng.sample(sorted(live - self._world.fixed), 5)
        absent = sorted(item_of.keys() - live)
        add = self._rng.sample(absent, min(5, len(absent)))
        reply = self._control.change_items(add=[item_of[name] for name in add], remove=remove)
        self._world.changed(reply.catalog_version, (live - set(remove)) | set(add))

    def activate(self) -> None:
        """A whole catalog from a file."""
        world = self._world
        others = sorted(world.item_of.keys() - world.fixed)
        live = set(world.fixed) | set(self._rng.sample(others, len(others) * 3 // 4))
        path = world.setting.run_dir / "catalogue.jsonl"
        path.write_text(
            "".join(world.item_of[name].model_dump_json() + "\n" for name in sorted(live)), encoding="utf-8"
        )
        version = self._control.build_catalog(str(path)).candidate
        self._control.validate_catalog(version)
        reply = self._control.activate_catalog(version)
        world.changed(reply.catalog_version, live)


def soak(
    served: Served, world: World, seconds: float, pause: float
) -> tuple[list[dict[str, Any]], Operator, list[float]]:
    """Load and swaps together; all lines of the load, the operator, and the memory of every second in MiB."""
    setting, folder = world.setting, world.setting.folder
    names = setting.catalog.external_ids
    histories = [[names[item] for item in history] for history in setting.histories if history][:200]
    with served.client() as client:
        model = client.models().data[0].id
    spec = soak_load.Spec(served.data, model, seconds, histories, sorted(world.fixed), BEAMS)
    (folder / "spec.json").write_text(json.dumps(asdict(spec)), encoding="utf-8")
    words = [sys.executable, "-m", "tests.benchmarks.soak_load", str(folder / "spec.json"), str(folder / "lines.jsonl")]
    memory, begin = [served.resident_mib], time.monotonic()
    with subprocess.Popen(words, cwd=REPOSITORY) as clients, served.controller() as control:
        operator = Operator(world, control)
        try:
            while clients.poll() is None:
                operator.step()
                time.sleep(pause)
                if time.monotonic() - begin >= len(memory):
                    memory.append(served.resident_mib)
        finally:
            clients.terminate()
    assert clients.returncode == 0, "the clients ended with an error"
    lines = (folder / "lines.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], operator, memory


def judged(lines: Sequence[dict[str, Any]], world: World, sample: int) -> dict[str, Any]:
    """Items that are not in the catalog of their answer, and answers that are not those of their versions."""
    catalog, oracle = world.setting.catalog, Oracle(world.setting.weights)
    given = [line for line in lines if line["status"] == 200]
    scored = [place for place, line in enumerate(given) if line["kind"] != "complete"]
    chosen = set(random.Random(0).sample(scored, min(sample, len(scored))))
    live, version = set(catalog.external_ids), 1
    histories = [history for history in world.setting.histories if history]
    result = {
        "invalid_items": 0,
        "unknown_versions": 0,
        "recomputed": 0,
        "mixed_versions": 0,
        "largest_difference": 0.0,
    }
    for place in sorted(range(len(given)), key=lambda place: given[place]["catalog"]):
        line = given[place]
        while version < line["catalog"]:
            version += 1
            added, removed = world.changes.get(version, (set(), set()))
            live = (live - removed) | added
        if line["weights"] not in world.weights or (version != 1 and version not in world.changes):
            result["unknown_versions"] += 1
            continue
        result["invalid_items"] += sum(name not in live for name, _ in line["items"])
        if place in chosen:
            table = admissible([world.path_of[name] for name in live], catalog.prompt_format.tokenizer.eos_id)
            prompt = catalog.prompt(histories[line["history"]]).flat.tolist()
            paths = [world.path_of[name] for name, _ in line["items"]]
            right = oracle.scores(world.weights[line["weights"]], table, prompt, paths)
            apart = max((abs(a - b) for a, (_, b) in zip(right, line["items"], strict=True)), default=0.0)
            result["recomputed"] += 1
            result["mixed_versions"] += apart > SCORE_TOLERANCE
            result["largest_difference"] = max(result["largest_difference"], rounded(apart))
    return result


def growth(memory: Sequence[float]) -> dict[str, float]:
    """Resident memory behind the warm-up and at the end, medians of a tenth of the time each."""
    first, width = int(WARM * len(memory)), max(1, int(ENDS * len(memory)))
    warm, end = (float(np.median(part)) for part in (memory[first : first + width], memory[-width:]))
    return {"warm_mib": rounded(warm), "end_mib": rounded(end), "growth": rounded((end - warm) / warm)}


def report(lines: Sequence[dict[str, Any]], operator: Operator, found: dict[str, Any], memory: dict[str, Any],
           minutes: float) -> dict[str, Any]:  # fmt: skip
    failures = [line for line in lines if not line["ok"]]
    goals = {
        "failures": len(failures) + len(operator.failed) == 0,
        "invalid_items": found["invalid_items"] == 0,
        "mixed_versions": found["mixed_versions"] + found["unknown_versions"] == 0 and found["recomputed"] > 0,
    }
    if minutes >= JUDGED:
        goals["memory"] = memory["growth"] < GROWTH
    return {
        "command": " ".join(["python -m tests.benchmarks.soak", *_shown_arguments()]),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain") else ""),
        "date": time.strftime("%Y-%m-%d"), "hardware": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "minutes": minutes, "requests": dict(Counter(line["kind"] for line in lines)),
        "replies": sum(line["status"] == 200 for line in lines), "failures": len(failures) + len(operator.failed),
        "examples": [*operator.failed[:5], *(f"{line['kind']} {line['status']}: {line.get('text')}"
                                             for line in failures[:5])],
        "swaps": dict(operator.done), **found, "memory": memory, "goals": goals,
        "failed": sorted(name for name, met in goals.items() if not met),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--generated", action="store_true", help="generated titles, which need no data; default: Industrial"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two changes")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="answers that are computed again")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    given = parser.parse_args(arguments)
    start(1)
    with serving.temporary_folder() as folder:
        setting = (serving.generated if given.generated else serving.industrial)(folder, weights=WEIGHTS)
        world = World.of(setting)
        with serving.server(setting, threads=given.threads) as served:
            lines, operator, memory = soak(served, world, 60 * given.minutes, given.pause)
        result = report(lines, operator, judged(lines, world, given.sample), growth(memory), given.minutes)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
