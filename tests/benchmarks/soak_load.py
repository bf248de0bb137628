"""Clients of every kind at once, good and bad, in a process of their own.

    python -m tests.benchmarks.soak_load SPEC.json RESULT.jsonl

One line per request: what was asked, the status, and of an answer the versions and items. ``ok``: the status is the one
that such a request has to get; a client that leaves early expects none.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import httpx

#: How many clients of a kind ask at once.
CLIENTS = {"recommend": 6, "score": 1, "complete": 1, "slow": 2, "leave": 2, "invalid": 1}
#: Seconds between two pieces of a slow client's body, and before it reads.
SLOW = 0.05
#: What is refused, and how.
INVALID: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/recommendations", b"{", 400),
    ("/v1/recommendations", b'{"history": ["no such item"]}', 400),
    ("/v1/recommendations", b'{"history": [], "n": 0}', 400),
    ("/v1/recommendations", b'{"history": [], "beams": 100000}', 400),
    ("/v1/recommendations", b'{"history": [], "bems": 4}', 400),
    ("/v1/recommendations", b'{"history": [], "weight_version": 0}', 409),
    ("/v1/score", b'{"history": [], "items": []}', 400),
    ("/v1/completions", b'{"model": "gpt-4", "prompt": "x"}', 404),
    ("/v1/nothing", b"{}", 404),
    ("/v1/recommendations", b" " * (1 << 20) + b"{}", 413),
)


@dataclass(frozen=True)
class Spec:
    """``histories`` and ``scored`` are external ids; items that are scored are never removed."""

    url: str
    model: str
    seconds: float
    histories: list[list[str]]
    scored: list[str]
    beams: int
    seed: int = 0


class Crowd:
    """All clients; every one of them asks again as soon as it is done."""

    def __init__(self, spec: Spec, http: httpx.AsyncClient, file: TextIO) -> None:
        self._spec, self._http, self._file = spec, http, file
        self._rng = random.Random(spec.seed)

    async def run(self) -> None:
        end = time.monotonic() + self._spec.seconds
        kinds: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "recommend": self.recommend, "score": self.score, "complete": self.complete, "slow": self.slow,
            "leave": self.leave, "invalid": self.invalid,
        }  # fmt: skip

        async def client(kind: str) -> None:
            while time.monotonic() < end:
                await kinds[kind]()

        await asyncio.gather(*(client(kind) for kind, count in CLIENTS.items() for _ in range(count)))

    def _asked(self) -> tuple[int, dict[str, Any]]:
        row = self._rng.randrange(len(self._spec.histories))
        n = self._rng.randint(1, 10)
        body = {
            "history": self._spec.histories[row], "n": n, "beams": max(n, self._spec.beams + self._rng.randint(-4, 4)),
            "exclude_history": self._rng.random() < 0.3, "return_tokens": self._rng.random() < 0.2,
        }  # fmt: skip
        return row, body

    async def recommend(self) -> None:
        row, body = self._asked()
        self._note("recommend", await self._post("/v1/recommendations", body), row)

    async def score(self) -> None:
        row = self._rng.randrange(len(self._spec.histories))
        body = {"history": self._spec.histories[row], "items": self._rng.sample(self._spec.scored, 3)}
        self._note("score", await self._post("/v1/score", body), row)

    async def complete(self) -> None:
        how = {"use_beam_search": True} if self._rng.random() < 0.5 else {"seed": self._rng.randrange(1000)}
        body = {"model": self._spec.model, "prompt": "<|item|>", "n": 3, **how}
        self._note("complete", await self._post("/v1/completions", body), None)

    async def slow(self) -> None:
        """Sends in pieces, waits, and reads in pieces."""
        row, body = self._asked()
        data = json.dumps(body).encode()

        async def pieces() -> AsyncIterator[bytes]:
            step = len(data) // 4 + 1
            for start in range(0, len(data), step):
                yield data[start : start + step]
                await asyncio.sleep(SLOW)

        headers = {"Content-Type": "application/json"}
        try:
            async with self._http.stream("POST", "/v1/recommendations", content=pieces(), headers=headers) as reply:
                await asyncio.sleep(SLOW)
                content = b"".join([part async for part in reply.aiter_bytes(256)])
            self._note("slow", (reply.status_code, content), row)
        except httpx.HTTPError as error:
            self._note("slow", (0, repr(error).encode()), row)

    async def leave(self) -> None:
        """Closes its connection before the answer can be there, or while it comes."""
        place, (_, body) = urlsplit(self._spec.url), self._asked()
        data = json.dumps(body).encode()
        head = f"POST /v1/recommendations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        sent = (head + data)[: self._rng.choice((len(head) - 3, len(head) + 5, len(head) + len(data)))]
        try:
            _, writer = await asyncio.open_connection(place.hostname, place.port)
            writer.write(sent)
            await writer.drain()
            await asyncio.sleep(self._rng.random() * 0.03)
            writer.transport.abort()
        except OSError as error:
            self._write({"kind": "leave", "ok": False, "status": 0, "text": repr(error)})
            return
        self._write({"kind": "leave", "ok": True, "status": 0})
        await asyncio.sleep(0.02)

    async def invalid(self) -> None:
        path, body, expected = self._rng.choice(INVALID)
        status, content = await self._post(path, body)
        line = {"kind": "invalid", "ok": status == expected, "status": status}
        self._write(line if status == expected else {**line, "text": f"{path} {body[:60]!r}: {content[:200]!r}"})
        await asyncio.sleep(0.02)

    async def _post(self, path: str, body: dict[str, Any] | bytes) -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            reply = await self._http.post(path, content=data, headers={"Content-Type": "application/json"})
        except httpx.HTTPError as error:
            return 0, repr(error).encode()
        return reply.status_code, reply.content

    def _note(self, kind: str, reply: tuple[int, bytes], row: int | None) -> None:
        status, content = reply
        if status != 200:
            self._write({"kind": kind, "ok": False, "status": status, "text": content[:300].decode(errors="replace")})
            return
        found = json.loads(content)
        items = found["choices" if kind == "complete" else "items"]
        self._write({
            "kind": kind, "ok": True, "status": 200, "history": row, "weights": found["weight_version"],
            "catalog": found["catalog_version"],
            "items": [[item["external_id"], item.get("score", item.get("logprob"))] for item in items],
        })  # fmt: skip

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


async def _run(spec: Spec, result: Path) -> None:
    with result.open("w", encoding="utf-8") as file:
        async with httpx.AsyncClient(base_url=spec.url, timeout=120) as http:
            await Crowd(spec, http, file).run()


def main(arguments: Sequence[str]) -> None:
    spec, result = (Path(name) for name in arguments)
    asyncio.run(_run(Spec(**json.loads(spec.read_text(encoding="utf-8"))), result))


if __name__ == "__main__":
    main(sys.argv[1:])
