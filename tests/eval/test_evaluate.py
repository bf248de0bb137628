"""Evaluation of a search with known results: ranks, credit on shared paths, data parallelism, validity, files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config import EvalConfig, RolloutConfig
from tawin_nemo.data.samples import Samples
from tawin_nemo.errors import ConfigError, DataError
from tawin_nemo.eval import evaluate as evaluate_module
from tawin_nemo.eval.evaluate import check_candidates, evaluate
from tawin_nemo.eval.result import EvalResult, compare
from tawin_nemo.maths.segments import segment_log_softmax
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.types import NO_ITEM, Candidates, DataParallel, TokenRows
from tests.rollout.sequence_lm import SequenceLM

EOS = 1
#: Items 2 and 4 are written alike.
PATHS = [[5, 6, EOS], [5, 7, EOS], [8, EOS], [9, 9, 9, EOS], [8, EOS], [4, EOS]]


@pytest.fixture
def catalog() -> Catalog:
    paths = TokenRows.from_lists(PATHS)
    names = [f"item {i}" for i in range(len(PATHS))]
    return Catalog(names, names, "title", paths, TokenTrie.from_paths(paths))


class ListedEngine:
    """Returns, for the prompt ``[r, ...]``, the items that ``lists[r]`` names; short lists are filled with NO_ITEM."""

    def __init__(self, catalog: Catalog, lists: list[list[int]]) -> None:
        self.catalog, self.lists = catalog, lists
        self.calls: list[int] = []

    def search(
        self, prompts: TokenRows, width: int, *, score_space: str | None = None, token_budget: int | None = None
    ) -> Candidates:
        assert token_budget == EvalConfig().token_budget
        self.calls.append(len(prompts))
        rows = [self.lists[int(prompts[i][0])][:width] for i in range(len(prompts))]
        items_BW = torch.tensor([row + [NO_ITEM] * (width - len(row)) for row in rows])
        return candidates(self.catalog, items_BW)


def candidates(catalog: Catalog, items_BW: Tensor) -> Candidates:
    tokens, lengths = catalog.paths.padded()
    listed_BW = items_BW != NO_ITEM
    safe_BW = items_BW.clamp(min=0)
    lengths_BW = torch.where(listed_BW, lengths[safe_BW], 0)
    scores_BW = torch.where(listed_BW, -torch.arange(items_BW.shape[1], dtype=torch.float32), -math.inf)
    return Candidates(
        items_BW=items_BW,
        leaf_BW=torch.where(listed_BW, torch.from_numpy(catalog.leaf_I)[safe_BW], -1),
        tokens_BWT=torch.where(listed_BW.unsqueeze(-1), tokens[safe_BW], 0),
        lengths_BW=lengths_BW,
        scores_BW=scores_BW,
        logprobs_BWT=torch.zeros(*items_BW.shape, tokens.shape[1]),
    )


def make_samples(targets: list[int], lengths: list[int] | None = None) -> Samples:
    """Row r has the prompt ``[r, 0, 0 ...]`` of the given length."""
    n = len(targets)
    lengths = lengths or [1 + (3 * r) % 5 for r in range(n)]
    prompts = TokenRows.from_lists([[r] + [0] * (lengths[r] - 1) for r in range(n)])
    history = TokenRows.from_lists([[0]] * n)
    return Samples(prompts, np.array(targets, dtype=np.int64), 100 + np.arange(n), history)


#: How often each item is a target in train.
POPULARITY = np.array([8, 4, 2, 1, 0, 3])


def run(engine: Any, samples: Samples, catalog: Catalog, dp: DataParallel | None = None, **cfg: Any) -> EvalResult:
    config = EvalConfig(**{"beams": 4, "ks": [1, 3], **cfg})
    return evaluate(engine, samples, catalog, config, dp=dp or DataParallel(), label="test", popularity_I=POPULARITY)


LISTS = [[0, 1, 2, 3], [0, 1, 2, 3], [3, 1, 2, 0], [5, 0], [1, 0, 3, 2], [3, 2, 1, 0]]
TARGETS = [0, 2, 4, 2, 5, 1]  # ranks 0, 2 (shared), 2 (shared, the other item of the path), absent, absent, 2


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
    ln = math.log
    assert result.beyond["popularity_bias@1"] == pytest.approx((2 * ln(8) + ln(3) + ln(4)) / 6 - ln(8))
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
    """The catalogue has five paths; cut-offs beyond them see all of them."""
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


def test_every_returned_path_is_checked_against_the_catalogue(catalog: Catalog) -> None:
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


def test_lists_shorter_than_the_beams_because_the_catalogue_is_small(catalog: Catalog) -> None:
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


def test_the_real_search_gives_the_ranks_of_the_enumerated_catalogue(catalog: Catalog) -> None:
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


def test_files_round_trip(catalog: Catalog, tmp_path: Path) -> None:
    result = run(ListedEngine(catalog, LISTS), make_samples(TARGETS), catalog)
    result.write(tmp_path / "eval", "test")
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["test.json", "test.per_user.parquet"]
    again = EvalResult.read(tmp_path / "eval", "test")
    assert list(again.means) == list(again.intervals) == list(result.means)
    assert again.per_user.equals(result.per_user)
    for field in dataclasses.fields(EvalResult):
        if field.name != "per_user":
            assert getattr(again, field.name) == getattr(result, field.name)
    (tmp_path / "eval" / "test.json").write_text('{"means": {}}')
    with pytest.raises(DataError, match=r"eval/test\.json"):
        EvalResult.read(tmp_path / "eval", "test")


def test_comparison_is_paired_by_row(catalog: Catalog) -> None:
    samples = make_samples(TARGETS)
    ours = run(ListedEngine(catalog, LISTS), samples, catalog)
    theirs = run(ListedEngine(catalog, [[3, 5, 0, 1]] * 6), samples, catalog)
    found = compare(ours, theirs, "recall@3")
    assert found.difference.mean == pytest.approx(ours.means["recall@3"] - theirs.means["recall@3"])
    assert found.detectable > 0
    with pytest.raises(DataError, match="6 rows against 5"):
        compare(ours, run(ListedEngine(catalog, LISTS), make_samples(TARGETS[:5]), catalog), "recall@3")
    with pytest.raises(DataError, match="metric recall@7"):
        compare(ours, theirs, "recall@7")


def test_files_of_older_versions_are_read(catalog: Catalog, tmp_path: Path) -> None:
    result = run(ListedEngine(catalog, LISTS), make_samples(TARGETS), catalog)
    result.write(tmp_path, "test")
    facts = json.loads((tmp_path / "test.json").read_text())
    assert facts["beyond"] == result.beyond
    del facts["beyond"]
    (tmp_path / "test.json").write_text(json.dumps(facts))
    again = EvalResult.read(tmp_path, "test")
    assert again.beyond == {}
    assert again.means == result.means
