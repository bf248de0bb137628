"""Mutated HTTP requests to both planes of a real server of two ranks: every one is answered, none is a fault of it.

    python -m tests.fuzz.requests --cases 20000 --seed 0 --ranks 2

A small model is trained, served by processes of its own, and asked by one client after the other. A case is a request
of the API documents with a slip: fields lost, renamed, of another type or out of limits, other methods, paths, headers
and bytes. Outcomes are the status codes; ``fault`` is a status of 500 or more (but for 504, the deadline that a body
asks for), an answer that is neither a documented reply nor an error in OpenAI's form, or none. Every 500 cases and at
the end the server must answer a plain request as it did at first.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from tawin_nemo.serve.http import openapi
from tests.fuzz.overrides import ODD
from tests.serve.scene import KEY
from tests.serve.test_process import Served, process
from tests.train.runs import SMALL, prepare_dataset, run

#: What ends the server, or waits for somebody else, when it is meant: only bodies that cannot be read go there.
ENDING = ("/shutdown", "/drain", "/init_weights_update_group")
#: A request of each kind that is answered with 200 (or refused with a reason), to be mutated.
GOOD: dict[str, list[Any]] = {
    "/v1/recommendations": [
        {"history": [3, 5], "n": 4, "beams": 6, "return_tokens": True}, {"prompt": "<|item|>", "n": 2, "exact": True},
        {"history": [1], "allow": [1, 2, 3], "deny": [2], "exclude_history": True, "min_score": -50.0, "timeout_s": 5},
        {"history_titles": ["lamp"], "weight_version": 1, "score_space": "trie"},
        {"history": [3], "filter": {"title": ["lamp"], "brand": "Acme", "price": 3.5}, "deny": [1]},
    ],
    "/v1/completions": [
        {"model": "MODEL", "prompt": "<|item|>", "n": 2, "use_beam_search": True, "logprobs": 1},
        {"model": "MODEL", "prompt": ["a", "b"], "n": 2, "best_of": 2, "seed": 5, "temperature": 0.5, "max_tokens": 16},
    ],
    "/v1/score": [{"history": [3], "items": [1, 2, 3]}, {"prompt": "<|item|>", "items": [4], "score_space": "vocab"}],
    "/v1/rollouts": [
        {"prompts": [[3, 5, 7]], "beams": 4, "score_space": "trie"},
        {"prompts": [[3, 5]], "draws": 2, "seeds": [1], "temperature": 1.0, "weight_version": 1, "timeout_s": 5},
    ],
    "/catalog/build": [{"add": [{"external_id": "N1", "title": "new lamp"}], "remove": []}, {"path": "/etc/passwd"}],
    "/catalog/items": [{"add": [{"external_id": "N2", "title": "other lamp"}], "remove": ["N1"]}],
    "/catalog/activate": [{"catalog_version": 1}],
    "/catalog/validate": [{"catalog_version": 2}],
    "/continue_generation": [{}],
    "/flush_cache": [{}],
    "/pause_generation": [{"abort": True, "wait_s": 0.1}],
    "/update_weights_from_disk": [{"model_path": "/nowhere", "weight_version": 7}, {"model_path": "STAGE"}],
    "/update_weights_from_distributed": [
        {"group_name": "g", "names": ["a"], "shapes": [[2]], "dtypes": ["float32"], "weight_version": 9},
    ],
    "/destroy_weights_update_group": [{"group_name": "g"}],
    "/init_weights_update_group": [
        {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "timeout_s": 1},
    ],
    "/shutdown": [{"abort": True, "wait_s": 0}],
    "/drain": [{"abort": True, "wait_s": 0}],
}  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308, math.nan, math.inf,
    -math.inf, "", "x", [], {}, [[]], [None], [[1]], {"a": 1}, [1] * 2000, ["x"] * 2000, "y" * 20000,
    [[3] * 300] * 40, [-1], [10**9], [1.5], [True],
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request, the status of its answer (0: none came), and what was wrong with that answer."""

    method: str
    path: str
    body: str
    status: int
    problem: str


def odd_value(rng: random.Random) -> Any:
    """Any JSON value, a text that has ended programs before, or a nest of lists."""
    kind = rng.random()
    if kind < 0.6:
        return deepcopy(rng.choice(VALUES))  # a body is changed in place
    if kind < 0.9:
        return rng.choice(ODD)
    value: Any = deepcopy(rng.choice(VALUES))
    for _ in range(rng.choice([1, 3, 50])):
        value = [value] if rng.random() < 0.5 else {rng.choice(ODD): value}
    return value


def mutated_body(body: Any, rng: random.Random) -> Any:
    """``body`` with one to three slips, somewhere in it."""
    changed = json.loads(json.dumps(body))
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_places(changed))
        if not places:
            return odd_value(rng)
        node, key = rng.choice(places)
        slip = rng.random()
        if slip < 0.6:
            node[key] = odd_value(rng)
        elif slip < 0.75:
            node.pop(key)
        elif isinstance(node, dict):
            node[f"{key}{rng.choice('sx_ ')}"] = node.pop(key) if rng.random() < 0.5 else odd_value(rng)
        else:
            node.extend(odd_value(rng) for _ in range(rng.choice([1, 50])))
    return changed


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested lists and objects."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])


def request(rng: random.Random, model: str, stage: str) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers of one case."""
    path = rng.choice(list(GOOD))
    body = json.dumps(mutated_body(rng.choice(GOOD[path]), rng)).replace("MODEL", model).replace("STAGE", stage)
    data = body.encode("utf-8", "surrogatepass")
    headers = {"Content-Type": "application/json"}
    slip = rng.random()
    if path in ENDING or slip < 0.1:  # bytes that are no JSON
        spot = rng.randrange(len(data))
        data = data[:spot] + bytes([rng.randrange(128, 256)]) + data[spot:] + b"}"
    elif slip < 0.13:
        headers["Content-Type"] = rng.choice(
            ["text/plain", "", "multipart/form-data", "application/json; charset=utf-7"]
        )
    elif slip < 0.16:
        headers[rng.choice(["Accept", "Content-Encoding", "X-Request-Id", "Expect", "Cookie"])] = rng.choice(
            ["gzip", "x" * 3000, "100-continue", "*/*"]
        )
    method = (
        "POST"
        if rng.random() < 0.95 or path in ENDING
        else rng.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
    )
    if rng.random() < 0.05:
        path += (
            rng.choice(["/", "/x", "?n=1", "?history=%ff", "/../status", "%00", "//"]) if path not in ENDING else "/x"
        )
    return method, path, data, headers


class Asker:
    """One client of both planes of a server."""

    def __init__(self, served: Served, stage: Path) -> None:
        control = set(json.loads(openapi.documents()["openapi_control.json"])["paths"])
        self._bases = {path: served.control if path in control else served.data for path in GOOD}
        self._served, self._stage = served, str(stage)
        self._http = httpx.Client(timeout=60)
        self._headers = {
            served.data: {"Authorization": f"Bearer {KEY}"},
            served.control: {"Authorization": f"Bearer {served.token}"},
        }
        self._model = self._http.get(f"{served.data}/v1/models", headers=self._headers[served.data]).json()["data"][0][
            "id"
        ]
        self._first = self.plain()

    def plain(self) -> list[Any]:
        """Catalog version and items of a plain request (paused or not)."""
        go_on = f"{self._served.control}/continue_generation"
        self._http.post(go_on, json={}, headers=self._headers[self._served.control])
        reply = self._http.post(
            f"{self._served.data}/v1/recommendations",
            json={"history": [3, 5], "n": 4},
            headers=self._headers[self._served.data],
        )
        assert reply.status_code == 200, reply.text
        found = reply.json()
        return [found["catalog_version"], *(item["external_id"] for item in found["items"])]

    def check(self) -> str:
        """What is wrong with the server, or nothing."""
        try:
            found = self.plain()
        except (AssertionError, httpx.HTTPError) as error:
            return f"a plain request fails: {error}"
        changed = found[0] > self._first[0] and len(found) == len(self._first)  # a request that was meant
        return "" if changed or found == self._first else f"a plain request got {found}, not {self._first}"

    def ask(self, rng: random.Random) -> Asked:
        """Send one mutated request; both planes are right for it at first sight."""
        method, path, body, extra = request(rng, self._model, self._stage)
        base = next(base for good, base in self._bases.items() if path.startswith(good))
        shown = body[:300].decode("utf-8", "replace")
        try:
            reply = self._http.request(method, base + path, content=body, headers={**self._headers[base], **extra})
        except httpx.InvalidURL:
            return Asked(method, path, shown, 400, "")
        except httpx.HTTPError as error:
            return Asked(method, path, shown, 0, f"{type(error).__name__}: {error}")
        return Asked(method, path, shown, reply.status_code, problem_of(reply))


def problem_of(reply: httpx.Response) -> str:
    """What is wrong with an answer: a status of faults, a body that is no JSON, an error without a message."""
    if reply.status_code >= 500 and reply.status_code != 504 and not _waits(reply):
        return f"status {reply.status_code}: {reply.text[:300]}"
    if reply.status_code >= 400 and reply.request.method != "HEAD":
        try:
            error = reply.json()["error"]
        except (ValueError, KeyError, TypeError):
            return f"status {reply.status_code} without an error: {reply.text[:200]}"
        return "" if error.get("message") else "an error without a message"
    return "Traceback in an answer" if "Traceback" in reply.text else ""


def _waits(reply: httpx.Response) -> bool:
    """A server that was told to pause answers 503 until it is told to go on."""
    return reply.status_code == 503 and "error" in reply.text


@contextmanager
def served(ranks: int, folder: Path) -> Iterator[tuple[Served, Path]]:
    """A server of a model that was trained for a moment."""
    run_dir = folder / "run"
    root = prepare_dataset(folder / "dataset")
    run(
        *SMALL,
        f"data.root={root}",
        f"run_dir={run_dir}",
        "rl.enabled=false",
        "sft.epochs=1",
        "compare.sft_continued=false",
    )
    (run_dir / "keys").write_text(KEY, encoding="utf-8")
    words = [f"trainer.devices={ranks}", f"model.tensor_model_parallel_size={ranks}"] if ranks > 1 else []
    with (folder / "log").open("w") as log, process(run_dir / "sft", *words, log=log) as running:
        yield running, run_dir / "sft"


def fuzz(cases: int, seed: int, ranks: int) -> tuple[list[Asked], list[str]]:
    """All answers, and what was wrong with the server in between."""
    rng, asked, problems = random.Random(seed), [], []
    with tempfile.TemporaryDirectory() as folder, served(ranks, Path(folder)) as (running, stage):
        asker = Asker(running, stage)
        for case in tqdm(range(cases), unit="request", disable=None):
            asked.append(asker.ask(rng))
            if case % 500 == 499 or case == cases - 1:
                problems += filter(None, [asker.check()])
                if problems or running.process.poll() is not None:
                    break
        log = (Path(folder) / "log").read_text(encoding="utf-8")
        if "Traceback" in log:
            problems.append(f"a traceback in the log: {log[log.index('Traceback') :][:2000]}")
        if running.process.poll() is not None:
            problems.append(f"the server ended with {running.process.returncode}: {log[-2000:]}")
    return asked, problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    given, begun = parser.parse_args(), time.monotonic()
    asked, problems = fuzz(given.cases, given.seed, given.ranks)
    for case in asked:
        if case.problem:
            print(json.dumps(asdict(case), ensure_ascii=True), file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    faults = sum(bool(case.problem) for case in asked)
    statuses = Counter(str(case.status) for case in asked)
    summary = {
        "cases": len(asked), "seed": given.seed, "ranks": given.ranks, "faults": faults, "server": problems,
        "seconds": round(time.monotonic() - begun), "statuses": dict(sorted(statuses.items())),
    }  # fmt: skip
    print(json.dumps(summary))
    sys.exit(bool(faults or problems))
