"""Parts of the server alone: messages on the wire, ranks that follow, the OpenAPI documents."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import numpy as np
import pytest

from tawin_nemo.models.megatron.parallel.channel import Stop, decode, encode
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.serve.engine.jobs import Job
from tawin_nemo.serve.engine.messages import (
    MESSAGES,
    Admit,
    Advance,
    Draw,
    Drop,
    Lane,
    LoadWeights,
    Message,
    Probe,
    PutCatalog,
    Release,
)
from tawin_nemo.serve.engine.ranks import Leader, follow
from tawin_nemo.serve.engine.replica import Replica
from tawin_nemo.serve.engine.running import Running
from tawin_nemo.serve.engine.telemetry import Metrics
from tawin_nemo.serve.http import openapi
from tawin_nemo.serve.http.server import listening_socket
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CheckpointError, DataError
from tests.rollout.sequence_lm import TableLM
from tests.serve.scene import first_catalog, tokenizer
from tests.serve.two_ranks import OneOfTwo, Wire

LANE = Lane(1, 2, "vocab")
ROWS = TokenRows.from_lists([[1, 2, 3], [], [4]])
NUMBERS = np.array([5, -1, 2**62], dtype=np.int64)


@pytest.mark.parametrize(
    "message",
    [
        Admit(LANE, ROWS, NUMBERS, NUMBERS + 1, NUMBERS * 0, ROWS),
        Advance(LANE),
        Drop(LANE, NUMBERS),
        Drop(LANE, None),
        Draw(LANE, ROWS, NUMBERS, 3, 0.5),
        LoadWeights(7, "/models/a b/ü"),
        PutCatalog(3, ROWS),
        Release([1, 2], []),
        Probe(),
        Stop(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_survive_encoding(message: Message) -> None:
    again = decode(encode(message), MESSAGES)
    assert type(again) is type(message)
    assert plain(again) == plain(message)


def plain(value):
    if isinstance(value, np.ndarray):
        return value.tolist()
    return {name: plain(item) for name, item in vars(value).items()} if hasattr(value, "__dict__") else value


def replica(catalog) -> Replica:
    def load(path: str) -> TableLM:
        if path == "broken":
            raise CheckpointError("broken")
        return TableLM(tokenizer().size, seed=len(path), impossible=False)

    made = Replica(load)
    made.models[1], made.tries[1] = load(""), catalog.trie
    return made


def test_a_follower_calls_its_model_exactly_as_the_leader_does() -> None:
    catalog = first_catalog()
    wire, first, second = Wire(), replica(catalog), replica(catalog)
    leader = Leader(first, OneOfTwo(wire, 0))
    follower = threading.Thread(target=follow, args=(second, OneOfTwo(wire, 1)))
    follower.start()
    running, jobs = Running(leader, Metrics()), []
    for weights, width in ((1, 3), (1, 8), (2, 5)):
        if weights == 2:
            leader.apply(LoadWeights(2, "xx"))
        given = ItemFilter.only(catalog.trie, range(width, 30))
        jobs.append(Job(catalog, catalog.prompt([width]), 1e18, width=width, filter=given, space="vocab"))
        running.begin(jobs[-1:], weights)
        running.advance()
    with pytest.raises(CheckpointError):
        leader.apply(LoadWeights(3, "broken"))
    jobs[1].cancelled = True
    running.drop_unwanted()
    while running.jobs:
        running.advance()
    draws = Job(catalog, catalog.prompt([9]), 1e18, draws=4, seeds=[3])
    running.begin([draws], 2)
    leader.put_catalog(PutCatalog(2, catalog.trie_paths), catalog.trie)
    leader.apply(Release([1], [1]))
    leader.apply(Probe())
    leader.apply(Stop())
    follower.join(30)
    assert not follower.is_alive()
    assert [len(job.future.result().prompts[0].hits) for job in (jobs[0], jobs[2], draws)] == [3, 5, 4]
    assert first.models.keys() == second.models.keys() == {2}
    assert first.tries.keys() == second.tries.keys() == {2}
    assert second.models[2].ran == first.models[2].ran != []
    assert second.models[2].prefilled == first.models[2].prefilled
    assert second.searches == {}


def test_a_follower_ends_with_an_error_that_the_ranks_may_not_share() -> None:
    wire = OneOfTwo(Wire(), 0)
    broken = replica(first_catalog())
    wire.send(encode(Admit(Lane(1, 1, "trie"), ROWS, NUMBERS, NUMBERS * 0 + 1, NUMBERS * 0, ROWS)))
    with pytest.raises(DataError, match="has no tokens"):
        follow(broken, wire)


def test_replies_do_not_wait_for_the_client_to_acknowledge_their_head() -> None:
    """Nagle's algorithm is off on what a listening socket of ours accepts: a reply is written in two pieces."""

    async def options() -> list[int]:
        accepted: list[int] = []

        def came(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listening_socket("127.0.0.1", 0, "serve.port") as place:
            server = await asyncio.start_server(came, sock=place)
            async with server:
                reader, writer = await asyncio.open_connection(*place.getsockname())
                await reader.read()
                writer.close()
        return accepted

    assert asyncio.run(options()) == [1]


@pytest.mark.parametrize("name", openapi.documents())
def test_the_exported_document_is_up_to_date(name: str) -> None:
    """``python -m tawin_nemo.serve.http.openapi`` writes it anew."""
    stored = (openapi.FOLDER / name).read_text(encoding="utf-8")
    assert stored == openapi.documents()[name]
    document = json.loads(stored)
    assert "422" not in {
        code for methods in document["paths"].values() for one in methods.values() for code in one["responses"]
    }
