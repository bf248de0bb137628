"""The load of a server from a process of its own: asyncio and aiohttp, closed or open loop.

    python -m tests.benchmarks.load SPEC.json RESULT.jsonl

Closed loop: ``concurrency`` clients, each of which asks again as soon as it has its reply. Open loop: requests begin
at the times of a Poisson process of ``rate`` a second, whether others have been answered or not, with at most
``concurrency`` under way; latency counts from the time at which a request should have begun, so that waiting for a
free place is not hidden. The first lines of the result are the replies, the last one is about the process itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

#: Nothing here imports torch: the load's process has to start quickly and stay small.
REPOSITORY = Path(__file__).resolve().parents[2]
#: Seconds that a reply may take: of a slow server each of many clients waits for all the others.
LONGEST = 900


@dataclass(frozen=True)
class Spec:
    """``bodies`` are asked for in turn, from ``first`` on; ``rate`` 0: a closed loop; ``warm`` seconds do not count."""

    url: str
    bodies: list[dict[str, Any]]
    seconds: float
    concurrency: int
    rate: float = 0.0
    warm: float = 1.0
    first: int = 0
    headers: dict[str, str] | None = None
    keep: bool = True  # the replies' contents


@dataclass(frozen=True)
class Reply:
    """``due`` and ``end`` are readings of ``time.monotonic``; ``status`` 0: no reply came."""

    body: int
    due: float
    end: float
    status: int
    content: dict[str, Any] | None

    @property
    def seconds(self) -> float:
        return self.end - self.due


@dataclass(frozen=True)
class Load:
    """What one run of the load found. ``core``: share of one core that the load's own process took; ``warm``: requests
    that did not count."""

    replies: list[Reply]
    seconds: float
    core: float
    warm: int = 0

    @property
    def failed(self) -> int:
        return sum(reply.status != 200 for reply in self.replies)

    @property
    def per_second(self) -> float:
        return (len(self.replies) - self.failed) / self.seconds

    def latency(self, share: float) -> float:
        """Quantile of the seconds of the answered requests."""
        return float(np.quantile([reply.seconds for reply in self.replies if reply.status == 200], share))

    def longest_gap(self, begin: float, end: float) -> float:
        """Seconds between two replies that follow each other, at most, among those that came between the two times."""
        times = sorted(reply.end for reply in self.replies if begin <= reply.end <= end)
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=end - begin)

    def slowest(self, begin: float, end: float) -> float:
        """Longest latency of the requests that were under way between the two times."""
        return max((reply.seconds for reply in self.replies if reply.end >= begin and reply.due <= end), default=0.0)


class Running:
    """A load in its process; ``result`` waits for its end. Both processes read one clock (CLOCK_MONOTONIC)."""

    def __init__(self, spec: Spec) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tawin_load_")
        self._spec, folder = spec, Path(self._folder.name)
        (folder / "spec.json").write_text(json.dumps(asdict(spec)), encoding="utf-8")
        self._result = folder / "result.jsonl"
        words = ["-m", "tests.benchmarks.load", str(folder / "spec.json"), str(self._result)]
        self._process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the load did not begin"
        self.begun = float(line)

    def stop(self) -> Load:
        """End it before its time."""
        self._process.terminate()
        return self.result()

    def result(self) -> Load:
        assert self._process.wait(self._spec.seconds + LONGEST) == 0, "the load ended with an error"
        *lines, last = self._result.read_text(encoding="utf-8").splitlines()
        about = json.loads(last)
        self._folder.cleanup()
        return Load([Reply(**json.loads(line)) for line in lines], about["seconds"], about["core"], about["warm"])


def load(spec: Spec) -> Load:
    return Running(spec).result()


# -- the process -----------------------------------------------------------------------------------------------------
class _Caller:
    def __init__(self, spec: Spec, http: aiohttp.ClientSession) -> None:
        self._spec, self._http = spec, http
        self._bodies = [json.dumps(body).encode() for body in spec.bodies]
        self._next = itertools.count(spec.first)
        self.replies: list[tuple[int, float, float, int, bytes]] = []
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True

    async def ask(self, due: float) -> None:
        body = next(self._next) % len(self._bodies)
        try:
            async with self._http.post(
                "/v1/recommendations", data=self._bodies[body], headers={"Content-Type": "application/json"}
            ) as reply:
                status, content = reply.status, await reply.read()
        except (aiohttp.ClientError, TimeoutError):
            status, content = 0, b""
        self.replies.append((body, due, time.monotonic(), status, content))

    async def closed(self, end: float) -> None:
        async def client() -> None:
            while (now := time.monotonic()) < end and not self.stopped:
                await self.ask(now)

        await asyncio.gather(*(client() for _ in range(self._spec.concurrency)))

    async def open(self, begin: float, end: float) -> None:
        rng, places = random.Random(0), asyncio.Semaphore(self._spec.concurrency)
        tasks: set[asyncio.Task[None]] = set()

        async def one(due: float) -> None:
            async with places:
                await self.ask(due)

        due = begin
        while (due := due + rng.expovariate(self._spec.rate)) < end and not self.stopped:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.add(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)


async def _run(spec: Spec, result: Path) -> None:
    # httpx looks through all its connections at every request: with 64 of them it would take a core for itself
    places, limit = aiohttp.TCPConnector(limit=spec.concurrency), aiohttp.ClientTimeout(total=LONGEST)
    async with aiohttp.ClientSession(spec.url, timeout=limit, connector=places, headers=spec.headers) as http:
        caller = _Caller(spec, http)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, caller.stop)
        begin = time.monotonic()
        counted = begin + spec.warm
        end = counted + spec.seconds
        print(counted, flush=True)
        cpu = _cpu_seconds()
        await (caller.open(begin, end) if spec.rate else caller.closed(end))
        stopped = time.monotonic()
        core = (_cpu_seconds() - cpu) / (stopped - begin)
    # an open loop's requests count when they were due in its time, a closed one's when they ended behind the warm-up
    kept = [reply for reply in caller.replies if reply[1 if spec.rate else 2] >= counted]
    with result.open("w", encoding="utf-8") as file:
        for body, due, ended, status, content in kept:
            shown = json.loads(content) if spec.keep and status == 200 else None
            file.write(json.dumps({"body": body, "due": due, "end": ended, "status": status, "content": shown}) + "\n")
        seconds = spec.seconds if spec.rate else stopped - counted  # a closed loop waits for its last requests
        file.write(json.dumps({"seconds": seconds, "core": core, "warm": len(caller.replies) - len(kept)}) + "\n")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str]) -> None:
    spec, result = (Path(name) for name in arguments)
    asyncio.run(_run(Spec(**json.loads(spec.read_text(encoding="utf-8"))), result))


if __name__ == "__main__":
    main(sys.argv[1:])
