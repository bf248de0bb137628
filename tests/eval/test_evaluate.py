"""Evaluation of a search with known results: ranks, credit on shared paths, data parallelism, validity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import EvalConfig, RolloutConfig
from tawin_nemo.eval import evaluate as evaluate_module
from tawin_nemo.eval.evaluate import check_candidates, evaluate
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.maths.segments import segment_log_softmax
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.types import NO_ITEM, Candidates, DataParallel
from tawin_nemo.util.errors import ConfigError, DataError
from tests.eval.listed_engine import (
    LISTS,
    PATHS,
    TARGETS,
    ListedEngine,
    candidates,
    make_catalog,
    make_samples,
    run,
)
from tests.rollout.sequence_lm import SequenceLM


@pytest.fixture
def catalog() -> Catalog:
    return make_catalog()


def test_ranks_credit_and_means_by_hand(catalog: Catalog) -> None:
    result = run(ListedEngine(catalog, LISTS), make_samples(TARGETS), catalog)
    table = result.per_user
    assert table.columns == [
        "row", "user", "target", "rank", "sharing", "candidates", "recall@1", "recall@3", "ndcg@1", "ndcg@3"
    ]  # fmt: skip
    assert table["user"].to_list() == [100, 101, 102, 103, 104, 105]
    assert table["rank"].to_list() == [0, 2, 2, -1, -1, 2]
    assert table["sharing"].to_list() == [1, 2, 2, 2, 1, 1]
    assert table["candidates"].to_list() == [4, 4, 4, 2, 4, 4]
    half, third = 1 / 2, 1 / math.log2(2 + 2)
    assert table["recall@3"].to_list() == [1, half, half, 0, 0, 1]
    assert table["ndcg@3"].to_list() == pytest.approx([1, half * third, half * third, 0, 0, third])
    assert result.means == pytest.approx(
        {
            "recall@1": 1 / 6,
            "recall@3": (1 + half + half + 1) / 6,
            "ndcg@1": 1 / 6,
            "ndcg@3": (1 + half * third + half * third + third) / 6,
        }
    )
    assert (result.rows, result.collisions, result.invalid_rate) == (6, 3, 0)
    assert result.short_rows == 1 / 6
    assert result.coverage == 5 / 5  # items 0, 1, 2 (with 4), 3, 5
    low, high = result.intervals["recall@3"]
    assert low < result.means["recall@3"] < high


def test_what_lists_look_like_beside_their_hits(catalog: Catalog) -> None:
    """Histories are item 0 throughout; first choices are the items 0, 0, 3, 5, 1, 3."""
    result = run(ListedEngine(catalog, LISTS), make_samples(TARGETS), catalog)
    ln = math.log1p
    of_lists = (2 * ln(8) + 2 * ln(1) + ln(3) + ln(4)) / 6
    assert result.beyond["popularity_bias@1"] == pytest.approx(of_lists - ln(8))
    assert result.beyond["coverage@1"] == 4 / 6
    assert result.beyond["coverage@3"] == 6 / 6  # item 4 through the path that it shares with item 2
    assert result.beyond["first_codes@10"] == (3 + 3 + 3 + 2 + 3 + 3) / 6
    assert set(result.beyond) == {f"{name}@{k}" for name in ("coverage", "popularity_bias") for k in (1, 3)} | {
        "first_codes@10"
    }
    config = EvalConfig(beams=4, ks=[1])
    plain = evaluate(
        ListedEngine(catalog, LISTS), make_samples(TARGETS), catalog, config, dp=DataParallel(), label="test"
    )
    assert set(plain.beyond) == {"coverage@1", "first_codes@10"}


def test_lists_longer_than_ten_places_count(catalog: Catalog) -> None:
    """The catalog has five paths; cut-offs beyond them see all of them."""
    result = run(ListedEngine(catalog, [[0, 1, 2, 3, 5]]), make_samples([5]), catalog, beams=50, ks=[2, 40])
    assert result.beyond["coverage@2"] == 2 / 6
    assert result.beyond["coverage@40"] == 1
    assert result.coverage == 1


def test_optimistic_credit_is_a_full_hit(catalog: Catalog) -> None:
    result = run(ListedEngine(catalog, LISTS), make_samples(TARGETS), catalog, collision="optimistic")
    assert result.per_user["recall@3"].to_list() == [1, 1, 1, 0, 0, 1]
    assert result.collision == "optimistic"


@pytest.mark.parametrize("size", [2, 4, 7])
def test_result_does_not_depend_on_the_number_of_replicas_or_chunks(
    catalog: Catalog, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(TARGETS)
    alone = run(ListedEngine(catalog, LISTS), samples, catalog)
    monkeypatch.setattr(evaluate_module, "CHUNK_ROWS", 2)
    parts: list[Any] = []

    class Handed(Exception):  # this rank's part is known, the others' are not yet
        pass

    def hand_in(value: Any) -> list[Any]:
        parts.append(value)
        raise Handed

    def replica(rank: int, gather: Callable[[Any], list[Any]]) -> EvalResult:
        return run(ListedEngine(catalog, LISTS), samples, catalog, DataParallel(rank, size, gather))

    for rank in range(size):
        with pytest.raises(Handed):
            replica(rank, hand_in)
    for rank in range(size):
        result = replica(rank, lambda _: parts)
        assert result.per_user.equals(alone.per_user)
        for name in ("means", "intervals", "invalid_rate", "short_rows", "coverage", "collisions", "beyond"):
            assert getattr(result, name) == getattr(alone, name)


def test_every_returned_path_is_checked_against_the_catalog(catalog: Catalog) -> None:
    good = candidates(catalog, torch.tensor([[0, 2, 3, NO_ITEM]]))
    returned_BW, invalid_BW = check_candidates(good, catalog)
    assert returned_BW.tolist() == [[True, True, True, False]]
    assert not invalid_BW.any()

    def broken(field: str, place: tuple[int, ...], value: int) -> list[bool]:
        changed = getattr(good, field).clone()
        changed[place] = value
        return check_candidates(dataclasses.replace(good, **{field: changed}), catalog)[1][0].tolist()

    assert broken("tokens_BWT", (0, 2, 2), 8) == [False, False, True, False]  # one wrong token, deep in the path
    assert broken("lengths_BW", (0, 0), 2) == [True, False, False, False]  # cut short
    assert broken("lengths_BW", (0, 0), 99) == [True, False, False, False]
    cut = dataclasses.replace(good, tokens_BWT=good.tokens_BWT[:, :, :3])
    assert check_candidates(cut, catalog)[1][0].tolist() == [False, False, True, False]  # only item 3 has four tokens
    assert broken("leaf_BW", (0, 1), 0) == [False, True, False, False]
    assert broken("items_BW", (0, 1), 3) == [False, True, False, False]  # the path of another item
    assert broken("items_BW", (0, 1), len(PATHS)) == [False, True, False, False]  # no such item
    assert broken("lengths_BW", (0, 3), 2) == [False, False, False, True]  # a path that claims to be no item


def test_invalid_rate_is_a_share_of_what_was_returned(catalog: Catalog) -> None:
    class Broken(ListedEngine):
        def search(self, *args: Any, **kwargs: Any) -> Candidates:
            found = super().search(*args, **kwargs)
            found.tokens_BWT[:, 0, 0] += 1
            return found

    result = run(Broken(catalog, LISTS), make_samples(TARGETS), catalog)
    assert result.invalid_rate == 6 / (5 * 4 + 2)
    assert result.per_user["candidates"].to_list() == [3, 3, 3, 1, 3, 3]


def test_lists_shorter_than_the_beams_because_the_catalog_is_small(catalog: Catalog) -> None:
    lists = [[0, 1, 2, 3, 5]] * 2
    result = run(ListedEngine(catalog, lists), make_samples([5, 0]), catalog, beams=50, ks=[10])
    assert result.short_rows == 0
    assert result.means["recall@10"] == 1


def test_impossible_requests(catalog: Catalog) -> None:
    engine = ListedEngine(catalog, LISTS)
    with pytest.raises(ConfigError, match=r"eval.ks=\[1, 5\] goes beyond eval.beams=4; raise eval.beams"):
        run(engine, make_samples(TARGETS), catalog, ks=[1, 5])
    with pytest.raises(DataError, match="no rows to evaluate"):
        run(engine, make_samples([]), catalog)


class BigramLM(SequenceLM):
    """Log-probs that depend on the last token only."""

    def __init__(self) -> None:
        super().__init__(vocab_size=10)
        self.table = torch.randn(10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def edge_logprobs(
        self, sequences: list[tuple[int, ...]], position_E: Tensor, token_E: Tensor, space: str
    ) -> Tensor:
        logit_E = self.table[torch.tensor([sequence[-1] for sequence in sequences])[position_E], token_E]
        return segment_log_softmax(logit_E, position_E, len(sequences))


def test_the_real_search_gives_the_ranks_of_the_enumerated_catalog(catalog: Catalog) -> None:
    lm = BigramLM()
    engine = RolloutEngine(lm, catalog, RolloutConfig(), seed=0)
    targets = [0, 1, 2, 3, 4, 5, 0, 1]
    samples = make_samples(targets, lengths=[1] * 8)  # prompts end in the tokens 0 to 7
    result = run(engine, samples, catalog, beams=50, ks=[3])

    def score(last: int, path: list[int]) -> float:
        total, node = 0.0, catalog.trie.root
        for token in path:
            tokens, _ = catalog.trie.children(node)
            total += float(lm.table[last, token] - lm.table[last, torch.from_numpy(tokens)].logsumexp(0))
            last, node = token, catalog.trie.step(node, token)
        return total

    for row, target in enumerate(targets):
        scores = {tuple(path): score(row, path) for path in PATHS}
        rank = sum(other > scores[tuple(PATHS[target])] for other in scores.values())
        assert result.per_user["rank"][row] == rank
    assert result.per_user["candidates"].to_list() == [5] * 8
    assert result.invalid_rate == 0
