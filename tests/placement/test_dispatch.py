"""Prompts of two training replicas are searched by other divisions of the same four ranks and come back in place.

The ranks are threads; what they tell each other goes over a board instead of a process group.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch

from tawin_nemo.placement.dispatch import dispatch_rollout
from tawin_nemo.types import DataParallel, PromptBatch, Rollout, TokenRows

RANKS, G = 4, 2


class Board:
    """Replicas of ``size``; ranks with the same remainder by RANKS / size are shards of different models."""

    def __init__(self, size: int) -> None:
        self._size, self._shards = size, RANKS // size
        self._barrier, self._values = Barrier(RANKS), [None] * RANKS

    def place(self, rank: int) -> DataParallel:
        replica, shard = divmod(rank, self._shards)

        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            values = self._values[shard :: self._shards]
            self._barrier.wait()
            return values

        return DataParallel(replica, self._size, gather)


def prompts(count: int) -> PromptBatch:
    rows = TokenRows.from_lists([np.arange(10 * r, 10 * r + 1 + r % 3) for r in range(count)])
    return PromptBatch(torch.arange(100, 100 + count), rows, torch.arange(count))


def searched(batch: PromptBatch, seen: Callable[[list[int]], None]) -> Rollout:
    """Every candidate's items say whose they are; paths are as long as the prompt, so that replicas' widths differ."""
    seen(batch.row_B.tolist())
    lengths = torch.from_numpy(batch.prompts.lengths)
    items_BG = batch.row_B[:, None] * 10 + torch.arange(G)
    longest = int(lengths.max()) if len(batch) else 0
    tokens_BGT = batch.prompts.padded()[0][:, None].expand(-1, G, -1) if len(batch) else torch.zeros(0, G, 0).long()
    assert tokens_BGT.shape[2] == longest
    return Rollout(
        prompts=batch,
        items_BG=items_BG,
        tokens_BGT=tokens_BGT,
        lengths_BG=lengths[:, None].expand(-1, G),
        scores_BG=-items_BG.float(),
        logprobs_BGT=-tokens_BGT.float(),
        is_target_BG=items_BG % 2 == 0,
        weight_version=7,
    )


@pytest.mark.parametrize("rollout_size", [1, 2, 4])
@pytest.mark.parametrize("count", [3, 9])
def test_everybody_gets_the_candidates_of_their_own_prompts(count: int, rollout_size: int) -> None:
    whole, training, searching = prompts(count), Board(2), Board(rollout_size)
    shares = [whole.take(torch.arange(count)[replica::2]) for replica in range(2)]
    ran: dict[int, list[int]] = {}

    def rank(number: int) -> Rollout:
        place = training.place(number)
        return dispatch_rollout(
            lambda batch: searched(batch, lambda rows: ran.update({number: rows})),
            shares[place.rank], place, searching.place(number),
        )  # fmt: skip

    with ThreadPoolExecutor(RANKS) as pool:
        results = list(pool.map(rank, range(RANKS)))
    for number, result in enumerate(results):
        own = shares[number // 2]
        expected = searched(own, lambda rows: None)
        assert result.prompts.row_B.tolist() == own.row_B.tolist()
        assert torch.equal(result.items_BG, expected.items_BG)
        assert torch.equal(result.scores_BG, expected.scores_BG)
        T = expected.tokens_BGT.shape[2]
        assert torch.equal(result.tokens_BGT[..., :T], expected.tokens_BGT)
        assert not result.tokens_BGT[..., T:].any()
        assert torch.equal(result.logprobs_BGT[..., :T], expected.logprobs_BGT)
        assert result.weight_version == 7
    shards = RANKS // rollout_size
    for shard in range(shards):  # each prompt once per set of replicas, in shares that differ by one at most
        dealt = [ran[number] for number in range(shard, RANKS, shards)]
        assert sorted(row for rows in dealt for row in rows) == whole.row_B.tolist()
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
