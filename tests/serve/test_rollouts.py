"""Rollouts and weights over the planes of one server: arrays equal a search in this process, weights come whole or not
at all, and under load no reply mixes versions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import pytest
import torch

from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.api.client import ServerError
from tawin_nemo.models.megatron.parallel.weight_group import TransferError, WeightGroup, host_store
from tawin_nemo.rollout.beam import constrained_beam_search
from tawin_nemo.rollout.sampling import constrained_sample
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import TawinError
from tests.rollout.sequence_lm import TableLM
from tests.serve.scene import TENSORS, Scene, first_catalog, path_scores, serving, tokenizer

LIMIT = timedelta(seconds=60)
NAMES = {name: size for row in TENSORS for name, size in row.items()}


def some_prompts() -> TokenRows:
    here = first_catalog()
    return TokenRows.from_lists([here.prompt(history).flat for history in ([3], [1, 2, 9], [], [5, 7])])


def rows(prompts: TokenRows) -> list[list[int]]:
    return [prompts[row].tolist() for row in range(len(prompts))]


def test_arrays_are_those_of_a_search_here(scene: Scene) -> None:
    prompts, lm, trie = some_prompts(), TableLM(tokenizer().size, seed=0, impossible=False), first_catalog().trie
    for space in ("trie", "vocab"):
        expected = constrained_beam_search(lm, prompts, trie, 7, score_space=space)
        with scene.client() as client:
            found = client.rollouts(rows(prompts), beams=7, score_space=space)
        assert_equal(found, expected)
    assert (found.weight_version, found.catalog) == (1, first_catalog().fingerprint)
    seeds = [11, 5, 11, 2**62]
    expected = constrained_sample(
        lm, prompts, trie, 6, generators=[torch.Generator().manual_seed(seed) for seed in seeds], temperature=1.5
    )
    with scene.client() as client:
        assert_equal(client.rollouts(rows(prompts), draws=6, seeds=seeds, temperature=1.5), expected)
        terms = client.rollout_terms()
    assert (terms.catalog, terms.weight_version, terms.instance) == (found.catalog, 1, found.instance)


def assert_equal(found: RolloutReply, expected) -> None:
    longest = int(expected.lengths_BW.max())
    assert torch.equal(found.items_BW, expected.items_BW)
    assert torch.equal(found.lengths_BW, expected.lengths_BW)
    assert torch.equal(found.scores_BW, expected.scores_BW)
    assert found.scores_BW.dtype == expected.scores_BW.dtype
    assert torch.equal(found.tokens_BWT, expected.tokens_BWT[..., :longest])
    assert torch.equal(found.logprobs_BWT, expected.logprobs_BWT[..., :longest])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompts": [[1]]}, "one of beams and draws"),
        ({"prompts": [[1]], "beams": 2, "draws": 2}, "one of beams and draws"),
        ({"prompts": [[1], []], "beams": 2}, "prompt 1 has no tokens"),
        ({"prompts": [[1] * 2048], "beams": 2}, "prompt 0 has 2048 tokens"),
        ({"prompts": [[10**6]], "beams": 2}, "token 1000000 is none"),
        ({"prompts": [[1]], "beams": 65}, "above serve.max_beams=64"),
        ({"prompts": [[1]], "beams": 60}, "distinct paths"),
        ({"prompts": [[1]], "draws": 2, "seeds": [1, 2]}, "as many seeds"),
        ({"prompts": [[1]], "draws": 2, "seeds": [1], "score_space": "vocab"}, "trie space"),
    ],
)  # fmt: skip
def test_what_cannot_be_rolled_out_is_refused(scene: Scene, fields: dict, words: str) -> None:
    with scene.http() as http:
        answer = http.post("/v1/rollouts", json=fields)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True), answer.text


def test_another_weight_version_is_409(scene: Scene) -> None:
    with scene.client() as client, pytest.raises(ServerError, match="version 9 was asked for") as caught:
        client.rollouts([[1]], beams=1, weight_version=9)
    assert (caught.value.status, caught.value.error.code) == (409, "stale_weights")


def test_bytes_that_are_no_rollout_are_an_error() -> None:
    for data in (b"", b"\x05\0\0\0\0\0\0\0{}   ", b"<html>"):
        with pytest.raises(TawinError, match="no rollout"):
            RolloutReply.decoded(data)


class Sender:
    """Rank 0 of a group with one server."""

    def __init__(self, scene: Scene, name: str = "group") -> None:
        self.scene, self.name = scene, name
        self.control, self.pool, store = scene.controller(), ThreadPoolExecutor(1), host_store(LIMIT)
        said = self.pool.submit(
            self.control.init_weights_group, master_address="127.0.0.1", master_port=store.port, group_name=name,
            backend="gloo", timeout_s=60.0,
        )  # fmt: skip
        self.group = WeightGroup(store, name, 0, 2, backend="gloo", limit=LIMIT, peer_ended=said.done)
        assert said.result().success

    def announce(self, **changes):
        fields = {
            "names": list(NAMES), "shapes": [list(size) for size in NAMES.values()], "group_name": self.name,
            "dtypes": ["torch.float32", "float32"],
        }  # fmt: skip
        return self.pool.submit(self.control.update_weights_from_distributed, **{**fields, **changes})

    def update(self, seed: int) -> int:
        said = self.announce()
        self.group.send([torch.tensor([seed // 10]).float(), torch.full((2, 3), float(seed % 10))], said.done)
        return said.result().weight_version


@contextmanager
def sender(scene: Scene, name: str = "group") -> Iterator[Sender]:
    made = Sender(scene, name)
    try:
        yield made
    finally:
        made.group.close()
        made.control.close()
        made.pool.shutdown()


def test_weights_that_are_not_the_models_are_refused_before_they_come() -> None:
    with serving() as scene, sender(scene) as job:
        for changes, words in (
            ({"names": ["tens"], "shapes": [[1]], "dtypes": ["float32"]}, "1 tensors are missing .ones."),
            ({"names": ["tens", "twos"]}, "1 are unknown .twos."),
            ({"names": ["tens", "tens"]}, "1 tensors are missing"),
            ({"shapes": [[1], [3, 2]]}, r"ones has shape \[3, 2\], this model's has \[2, 3\]"),
            ({"dtypes": ["bfloat16", "float32"]}, "weights in bfloat16 for a model in float32"),
            ({"dtypes": ["float32"]}, "one of each per tensor"),
            ({"weight_version": 1}, "1 is not newer than 1"),
            ({"group_name": "other"}, "no weight group 'other' here, but 'group'"),
        ):
            with pytest.raises(ServerError, match=words):
                job.announce(**changes).result()
        assert scene.engine.weights == 1
        assert job.control.status().weight_update_group == "group"
        assert job.control.destroy_weights_group("group").success
        with pytest.raises(ServerError, match="no weight group") as caught:
            job.announce().result()
        assert caught.value.status == 404


def test_a_sender_that_is_lost_half_way_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as scene, scene.client() as client:
        before = client.recommend([3], n=5)
        with sender(scene) as job:
            said = job.announce()
            job.group._signal_or_wait("ready/1", said.done)
            job.group._broadcast([torch.ones(1)])
            job.group.close()  # its connections close, as those of a process that dies do
            with pytest.raises(ServerError, match="did not arrive whole") as caught:
                said.result()
        assert (caught.value.status, caught.value.error.code) == (503, "transfer_failed")
        assert client.recommend([3], n=5).items == before.items
        assert scene.engine.weights == 1
        with sender(scene, "again") as job:
            assert job.update(7) == 2
        assert client.recommend([3], n=5).items != before.items


def test_updates_in_a_loop_under_load_lose_nothing_and_mix_nothing() -> None:
    seeds, over, asked = {1: 0}, threading.Event(), rows(some_prompts())
    with serving() as scene, sender(scene) as job, ThreadPoolExecutor(4) as pool:

        def user(number: int) -> list:
            seen = []
            with scene.client() as client:
                while not over.is_set():
                    if number % 2:
                        seen.append(client.rollouts(asked, beams=5))
                    else:
                        seen.append(client.recommend([number], n=8, beams=12))
            return seen

        users = [pool.submit(user, number) for number in range(4)]
        try:
            for seed in range(1, 11):
                seeds[job.update(seed)] = seed
                reached = scene.metric("tawin_phase_seconds_count", phase="run") + 4
                scene.wait_until(lambda: scene.metric("tawin_phase_seconds_count", phase="run") >= reached)  # noqa: B023
        finally:
            over.set()
        replies = [future.result(60) for future in users]
    lists, catalog = {}, first_catalog()
    for number, seen in enumerate(replies):
        assert len({reply.weight_version for reply in seen}) > 5
        for reply in seen:
            seed = seeds[reply.weight_version]
            if number % 2:
                lm = TableLM(tokenizer().size, seed=seed, impossible=False)
                key = ("rollouts", seed)
                if key not in lists:
                    lists[key] = constrained_beam_search(lm, some_prompts(), catalog.trie, 5)
                assert_equal(reply, lists[key])
            else:
                key = (number, seed)
                if key not in lists:
                    lists[key] = path_scores([number], seed=seed)
                assert {item.item: item.score for item in reply.items} == {
                    item.item: lists[key][item.item] for item in reply.items
                }


def test_a_group_that_nobody_joins_or_answers_is_given_up() -> None:
    with pytest.raises(TransferError, match="has ended the call"):
        WeightGroup(host_store(LIMIT), "g", 0, 2, backend="gloo", limit=LIMIT, peer_ended=lambda: True)
    with pytest.raises(TransferError, match=r"no here from group g within 0\.05 s"):
        WeightGroup(host_store(LIMIT), "g", 0, 2, backend="gloo", limit=timedelta(seconds=0.05))
    with serving() as scene, scene.controller() as control:
        for fields, words in (
            ({"master_port": 1, "backend": "gloo", "timeout_s": 0.5}, "cannot be reached"),
            ({"master_port": 1, "rank_offset": 2}, "below world_size=2"),
            *([] if torch.cuda.is_available() else [({"master_port": 1}, "needs a GPU")]),
        ):
            with pytest.raises(ServerError, match=words):
                control.init_weights_group(master_address="127.0.0.1", **fields)


def test_a_rank_that_comes_after_the_sender_has_given_up_is_told_so() -> None:
    """A server that was suspended while it joined; it would wait for the sender until the limit."""
    store = host_store(LIMIT)
    with pytest.raises(TransferError, match="no here from group late"):
        WeightGroup(store, "late", 0, 2, backend="gloo", limit=timedelta(seconds=0.05))
    start = time.monotonic()
    with pytest.raises(TransferError, match="has ended the call"):
        WeightGroup.join("127.0.0.1", store.port, "late", 1, 2, backend="gloo", limit=LIMIT)
    assert time.monotonic() - start < LIMIT.total_seconds() / 2


def test_prompts_are_divided_alike_whoever_is_alive() -> None:
    from tawin_nemo.placement.server_parts import RequestLimits, split_prompts

    lengths = np.random.default_rng(1).integers(3, 40, 50)
    free = RequestLimits(1 << 62, 1 << 62, 1 << 62, 1 << 62)
    whole = split_prompts(lengths, 1, 4, 3, free)
    assert len(whole) == 1
    assert lengths[whole[0][1]].tolist() == sorted(lengths.tolist(), reverse=True)
    for limit, size in (
        (RequestLimits(4, 200, 1 << 62, 1 << 62), lambda rows: lengths[rows].sum() + 12 * len(rows) <= 200),
        (RequestLimits(4, 1 << 62, 20, 1 << 62), lambda rows: 4 * len(rows) <= 20),
        (RequestLimits(4, 1 << 62, 1 << 62, 8192 + 900), lambda rows: lengths[rows].sum() <= 100),
        (RequestLimits(4, 1, 1, 1), lambda rows: len(rows) == 1),
    ):
        parts = split_prompts(lengths, 3, 4, 3, limit)
        assert all(size(rows) for _, rows in parts)
        assert sorted(np.concatenate([rows for _, rows in parts]).tolist()) == list(range(50))
        assert {home for home, _ in parts} == {0, 1, 2}
