"""A search that an auxiliary recommender joins, against an enumeration of all items, and against no assistance."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_lm import TableLM
from token_synchronous import token_synchronous_search

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.rollout import select_dense
from tawin_nemo.rollout.assist import Assist, edge_logprobs
from tawin_nemo.rollout.beam import BeamSearch, collect_candidates
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.types import Candidates, PromptBatch, TokenRows
from tawin_nemo.util.errors import TawinError

VOCAB, EOS = 50, 0
#: Float64, the same few additions in another order.
TOLERANCE = 1e-12


@st.composite
def catalogs(draw: st.DrawFn) -> list[list[int]]:
    """Few tokens, so that paths share beginnings, repeat, and have tokens without a choice."""
    shared = draw(st.lists(st.integers(6, 9), max_size=2))
    bodies = st.lists(st.integers(1, 3), max_size=4)
    return [[*shared, *body, EOS] for body in draw(st.lists(bodies, min_size=1, max_size=14))]


class Slow:
    """The definition: shares of the softmax over all items, of those whose path begins alike."""

    def __init__(self, paths: list[list[int]], scores: np.ndarray) -> None:
        self.paths, self.scores = paths, scores.astype(np.longdouble)

    def mass(self, start: tuple[int, ...]) -> np.longdouble:
        shares = np.exp(self.scores - self.scores.max())
        below = [share for share, path in zip(shares, self.paths, strict=True) if tuple(path[: len(start)]) == start]
        return np.longdouble(sum(below)) / shares.sum()

    def edge(self, start: tuple[int, ...], token: int) -> float:
        return float(np.log(self.mass((*start, token))) - np.log(self.mass(start)))


def mixed(slow: Slow, lm: TableLM, prompt: list[int], weight: float, space: str, allowed: set[int] | None = None):
    """Log-probs of a path's next tokens, as the token-by-token oracle takes them."""

    def logprobs(path: tuple[int, ...], tokens: list[int]) -> list[float]:
        values = lm.path_logprobs((*prompt, *path), tokens, space)
        if len(tokens) > 1:
            values = [
                weight * value + (1 - weight) * slow.edge(path, token) if value > -math.inf else value
                for value, token in zip(values, tokens, strict=True)
            ]
        else:
            values = [weight * value if value > -math.inf else value for value in values]
        return [
            value if allowed is None or allows(slow.paths, allowed, (*path, token)) else -math.inf
            for value, token in zip(values, tokens, strict=True)
        ]

    return logprobs


def allows(paths: list[list[int]], allowed: set[int], start: tuple[int, ...]) -> bool:
    return any(tuple(paths[item][: len(start)]) == start for item in allowed)


def some_scores(seed: int, prompts: int, items: int, spread: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, spread, (prompts, items)))


@given(catalogs(), st.integers(0, 1000), st.sampled_from([0.1, 3.0, 60.0]))
def test_edges_are_shares_of_the_softmax_over_all_items(paths: list[list[int]], seed: int, spread: float) -> None:
    """Also of items that are 1e-100 times as likely as the best one, where running sums have nothing left."""
    trie, scores = TokenTrie.from_paths(paths), some_scores(seed, 2, len(paths), spread).numpy()
    edge_BV = edge_logprobs(trie, scores)
    assert edge_BV.shape == (2, trie.num_nodes)
    for row in range(2):
        slow = Slow(paths, scores[row])
        walked = {}
        for path in paths:
            position, start = trie.root, ()
            for token in path:
                tokens, positions = trie.children(position)
                position = int(positions[tokens.tolist().index(token)])
                if len(tokens) > 1:  # the edge leads to the node behind the tokens without a choice
                    walked[position % trie.num_nodes] = slow.edge(start, token)
                start = (*start, token)
        expected_V = np.array([walked.get(node, 0.0) for node in range(trie.num_nodes)])
        np.testing.assert_allclose(edge_BV[row], expected_V, rtol=1e-9, atol=TOLERANCE)
    assert (edge_BV <= 0).all()


@settings(max_examples=60)
@given(catalogs(), st.integers(0, 1000), st.floats(0.0, 0.99), st.sampled_from(["trie", "vocab"]))
def test_with_enough_beams_the_result_is_the_ranking_of_all_items_by_their_sums(
    paths: list[list[int]], seed: int, weight: float, space: str
) -> None:
    """Every item is walked by itself; its total is the sum over its edges. Exactly the same items, best first."""
    trie, lm, prompt = TokenTrie.from_paths(paths), TableLM(VOCAB, seed=seed), [10, 11]
    scores = some_scores(seed, 1, len(paths))
    logprobs = mixed(Slow(paths, scores[0].numpy()), lm, prompt, weight, space)
    totals: dict[int, float] = {}
    for item, path in enumerate(paths):
        position, total, start = trie.root, 0.0, ()
        for token in path:
            tokens, positions = (array.tolist() for array in trie.children(position))
            total += logprobs(start, tokens)[tokens.index(token)]
            position, start = positions[tokens.index(token)], (*start, token)
        if total > -math.inf:
            totals[int(trie.leaf_I[item])] = total
    search = BeamSearch(lm, trie, trie.num_leaves, score_space=space)
    search.admit(TokenRows.from_lists([prompt]), [0], assist=Assist.of(trie, scores, weight))
    found = finished(search, trie.num_leaves, trie)
    leaves = found.leaf_BW[0][found.leaf_BW[0] >= 0].tolist()
    assert leaves == sorted(totals, key=lambda leaf: -totals[leaf])
    np.testing.assert_allclose(found.scores_BW[0][: len(leaves)], [totals[leaf] for leaf in leaves], atol=1e-11)


@settings(max_examples=100)
@given(st.data(), catalogs(), st.integers(0, 1000), st.sampled_from(["trie", "vocab"]))
def test_each_prompt_gets_what_the_slow_search_finds_for_it_alone(
    data: st.DataObject, paths: list[list[int]], seed: int, space: str
) -> None:
    """Prompts join and leave, with and without assistance and filters, and with widths of their own."""
    trie, lm = TokenTrie.from_paths(paths), TableLM(VOCAB, seed=seed)
    count = data.draw(st.integers(1, 5))
    prompts = [[10 + row] for row in range(count)]
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.3, 0.7, 1.0]), min_size=count, max_size=count))
    widths = data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    everything = frozenset(range(len(paths)))
    allowed = data.draw(st.lists(st.none() | st.frozensets(st.sampled_from(sorted(everything))), min_size=count,
                                 max_size=count))  # fmt: skip
    arrivals = iter(data.draw(st.lists(st.integers(0, 2), max_size=5)))
    scores = some_scores(seed, count, len(paths))
    search, came, parts = BeamSearch(lm, trie, 1, score_space=space), 0, []
    while came < count or search.running:
        upto = min(count, came + next(arrivals, count))
        if upto > came:
            rows = slice(came, upto)
            assist = None
            if any(weight < 1 for weight in weights[rows]):
                assist = Assist.of(trie, scores[rows], 0.0)
                none = torch.tensor(weights[rows]) == 1
                assist = Assist(torch.tensor(weights[rows], dtype=torch.float64),
                                assist.edge_PV.masked_fill(none[:, None], 0.0))  # fmt: skip
            search.admit(
                TokenRows.from_lists(prompts[rows]), list(range(came, upto)), widths=widths[rows], assist=assist,
                filters=[None if items is None else ItemFilter.only(trie, items) for items in allowed[rows]],
            )  # fmt: skip
        came = upto
        parts.append(search.advance())
    seen = {}
    for part in parts:
        for row, ticket in enumerate(part.ticket_B.tolist()):
            leaves = part.candidates.leaf_BW[row].tolist()
            seen[ticket] = [pair for pair in zip(leaves, part.candidates.scores_BW[row].tolist(), strict=True)
                            if pair[0] >= 0]  # fmt: skip
    for row in range(count):
        slow = Slow(paths, scores[row].numpy())
        chosen = None if allowed[row] is None else set(allowed[row])
        logprobs = (
            mixed(slow, lm, prompts[row], weights[row], space, chosen) if weights[row] < 1
            else plain(lm, prompts[row], space, paths, chosen)
        )  # fmt: skip
        expected = token_synchronous_search(logprobs, trie, widths[row])
        assert [leaf for leaf, _ in seen[row]] == [path.position for path in expected]
        np.testing.assert_allclose([score for _, score in seen[row]], [path.score for path in expected], atol=1e-11)


def plain(lm: TableLM, prompt: list[int], space: str, paths: list[list[int]], allowed: set[int] | None):
    def logprobs(path: tuple[int, ...], tokens: list[int]) -> list[float]:
        values = lm.path_logprobs((*prompt, *path), tokens, space)
        return [
            value if allowed is None or allows(paths, allowed, (*path, token)) else -math.inf
            for value, token in zip(values, tokens, strict=True)
        ]

    return logprobs


def finished(search: BeamSearch, width: int, trie: TokenTrie) -> Candidates:
    """What a search returns when it is run to its end, in the order of its tickets."""
    parts = []
    while search.running:
        parts.append(search.advance())
    return collect_candidates(parts, width, trie)


def scene(seed: int) -> tuple[RolloutEngine, TokenRows, TokenRows, torch.Tensor]:
    rng = np.random.default_rng(seed)
    paths = [[*rng.integers(1, 5, rng.integers(1, 5)).tolist(), EOS] for _ in range(60)]
    rows = TokenRows.from_lists(paths)
    names = [str(item) for item in range(len(paths))]
    catalog = Catalog(names, names, "title", rows, TokenTrie.from_paths(rows))
    prompts = TokenRows.from_lists([rng.integers(10, VOCAB, rng.integers(1, 9)).tolist() for _ in range(9)])
    histories = TokenRows.from_lists([[int(row)] for row in range(9)])
    engine = RolloutEngine(TableLM(VOCAB, impossible=False, dtype=torch.float32), catalog, RolloutConfig(), seed=1)
    return engine, prompts, histories, some_scores(seed, 9, len(paths))


def assert_same(one: Candidates, other: Candidates) -> None:
    for item in fields(Candidates):
        assert torch.equal(getattr(one, item.name), getattr(other, item.name)), item.name


def test_prompts_of_weight_one_are_searched_as_without_assistance() -> None:
    engine, prompts, _, scores = scene(3)
    trie = engine.catalog.trie
    alone = engine.search(prompts, 7)
    search = BeamSearch(engine.lm, trie, 7)
    both = Assist.cat([Assist.none(4, trie), Assist.of(trie, scores[4:], 0.4)])
    search.admit(prompts, np.arange(9), assist=both)
    found = finished(search, 7, trie)
    assert_same(found.take(torch.arange(4)), alone.take(torch.arange(4)))
    assert not torch.equal(found.leaf_BW[4:], alone.leaf_BW[4:])


def test_an_engine_asks_its_assistant_for_the_prompts_that_begin_and_rollouts_are_the_models_own() -> None:
    engine, prompts, histories, scores = scene(5)
    trie, asked = engine.catalog.trie, []

    def assistant(given: TokenRows) -> Assist:
        asked.append(given.flat.tolist())
        return Assist.of(trie, scores[given.flat], 0.4)

    batch = PromptBatch(torch.arange(9), prompts, torch.zeros(9, dtype=torch.long))
    options = {"negatives": "beam", "policy_space": "trie", "step": 0}
    rollout, alone = engine.generate(batch, 5, **options), engine.search(prompts, 6)
    engine.assistant = assistant
    assert_same(engine.search(prompts, 6), alone)  # a search without histories has no assistance
    assert torch.equal(engine.generate(batch, 5, **options).scores_BG, rollout.scores_BG)
    assert asked == []
    whole = engine.search(prompts, 6, histories=histories)
    assert sorted(row for rows in asked for row in rows) == list(range(9))
    assert not torch.equal(whole.leaf_BW, alone.leaf_BW)
    parts = engine.search(prompts, 6, histories=histories, token_budget=40)
    assert len(asked) > 2
    assert_same(parts, whole)
    # Log-probs stay the model's own; the score mixes their sum with the recommender's share of the path.
    shares = torch.log_softmax(scores, dim=1)
    leaf_I = torch.from_numpy(trie.leaf_I)
    for row in range(9):
        for leaf, score, logprobs in zip(
            whole.leaf_BW[row], whole.scores_BW[row], whole.logprobs_BWT[row], strict=True
        ):
            share = shares[row, leaf_I == leaf].logsumexp(0)
            assert float(score) == pytest.approx(0.4 * float(logprobs.sum()) + 0.6 * float(share), abs=1e-5)


@pytest.mark.parametrize("space", ["trie", "vocab"])
def test_the_step_for_gpus_gives_the_same_search(monkeypatch: pytest.MonkeyPatch, space: str) -> None:
    engine, prompts, histories, scores = scene(7)
    engine.assistant = lambda given: Assist.of(engine.catalog.trie, scores[given.flat], 0.6)
    filters = [ItemFilter.without(engine.catalog.trie, range(row, row + 9)) for row in range(9)]
    options = {"histories": histories, "filters": filters, "score_space": space}
    expected = engine.search(prompts, 8, **options)
    monkeypatch.setitem(select_dense._DENSE, "cpu", True)
    assert_same(engine.search(prompts, 8, **options), expected)


def test_scores_that_are_not_numbers_are_refused() -> None:
    trie = TokenTrie.from_paths([[1, EOS], [2, EOS]])
    with pytest.raises(TawinError, match=r"rollout\.assist\.stage: .*not numbers"):
        Assist.of(trie, torch.tensor([[0.0, math.nan]]), 0.5)


def test_no_item_is_impossible_unless_its_score_is() -> None:
    trie = TokenTrie.from_paths([[1, EOS], [2, EOS], [3, EOS]])
    edge_V = edge_logprobs(trie, np.array([[0.0, -9e4, -np.inf]]))[0, trie.leaf_I]
    assert edge_V.tolist() == [0.0, pytest.approx(-700), -math.inf]
