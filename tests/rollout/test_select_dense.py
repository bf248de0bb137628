"""The step of few launches gives the beams of the usual one, bit for bit, and asks the host for less than half."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from fixed_table import FixedTableLM
from launches import Launches
from sequence_lm import TableLM

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.catalog.trie_dense import StepLimits
from tawin_nemo.rollout import select_dense
from tawin_nemo.rollout.beam import BeamSearch, FinishedPrompts
from tawin_nemo.rollout.filters import ItemFilter
from tawin_nemo.types import Candidates, TokenRows
from tawin_nemo.util.errors import TawinError

VOCAB, EOS = 24, 0


def paths_with_eos(rng: np.random.Generator, items: int) -> list[list[int]]:
    """Mixed lengths: shared prefixes, forced tails and equal paths occur."""
    tokens, longest = int(rng.integers(2, 9)), int(rng.integers(2, 8))
    return [[*rng.integers(1, tokens + 1, rng.integers(1, longest)).tolist(), EOS] for _ in range(items)]


def paths_without_eos(rng: np.random.Generator, items: int) -> list[list[int]]:
    """Codes of three lengths, told apart by their first: many paths end at one node."""
    kinds = rng.integers(0, 3, items)
    return [[1 + int(kind), *rng.integers(1, 9, 1 + kind).tolist()] for kind in kinds]


PATHS = {"with EOS": paths_with_eos, "without EOS": paths_without_eos}


def some_prompts(rng: np.random.Generator, rows: int) -> TokenRows:
    return TokenRows.from_lists([rng.integers(1, VOCAB, rng.integers(1, 6)).tolist() for _ in range(rows)])


def each_alone(
    lm: TableLM, prompts: TokenRows, trie: TokenTrie, width: int, filters: list[ItemFilter] | None = None,
    **options: object,
) -> tuple[Candidates, np.ndarray]:  # fmt: skip
    """Candidates and the best pruned score of every prompt, searched by itself."""
    finished: list[FinishedPrompts] = []
    for row in range(len(prompts)):
        search = BeamSearch(lm, trie, width, **options)
        search.admit(prompts.take(np.array([row])), [row], filters=None if filters is None else [filters[row]])
        while search.running:
            finished.append(search.advance())
    finished = [part for part in finished if len(part)]
    return Candidates.cat([part.candidates for part in finished]), np.concatenate([p.pruned_score_B for p in finished])


def assert_equal(found: tuple[Candidates, np.ndarray], expected: tuple[Candidates, np.ndarray]) -> None:
    for item in fields(Candidates):
        assert torch.equal(getattr(found[0], item.name), getattr(expected[0], item.name)), item.name
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("space", ["trie", "vocab"])
@pytest.mark.parametrize("seed", range(6))
def test_both_forms_of_a_step_give_the_same_search(
    monkeypatch: pytest.MonkeyPatch, kind: str, space: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    trie = TokenTrie.from_paths(PATHS[kind](rng, int(rng.integers(1, 90))))
    prompts, width = some_prompts(rng, 4), int(rng.integers(1, 12))
    lm = TableLM(VOCAB, seed=seed, dtype=torch.float32 if seed % 2 else torch.float64)
    filters = None
    if seed % 3 == 2:
        listed = [rng.choice(trie.num_items, max(1, trie.num_items // 3), replace=False).tolist() for _ in range(4)]
        filters = [ItemFilter.only(trie, items) for items in listed]
    options = {"score_space": space, "length_penalty": [0.0, 0.7, -0.4][seed % 3]}
    expected = each_alone(lm, prompts, trie, width, filters, **options)
    calls: list[int] = []
    plain = select_dense.step
    monkeypatch.setattr(select_dense, "step", lambda *given: calls.append(1) or plain(*given))
    monkeypatch.setitem(select_dense._DENSE, "cpu", True)
    assert_equal(each_alone(lm, prompts, trie, width, filters, **options), expected)
    assert calls or trie.num_leaves == 1


@pytest.mark.parametrize("kind", PATHS)
def test_many_columns_are_ranked_alike(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rng = np.random.default_rng(3)
    trie = TokenTrie.from_paths(PATHS[kind](rng, 80))
    prompts, lm = some_prompts(rng, 3), TableLM(VOCAB, dtype=torch.float32)
    expected = each_alone(lm, prompts, trie, 5)
    monkeypatch.setitem(select_dense._DENSE, "cpu", True)
    monkeypatch.setattr(select_dense, "_SORTED_COLUMNS", 4)
    assert_equal(each_alone(lm, prompts, trie, 5), expected)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("seed", range(5))
def test_no_step_has_more_continuations_than_the_limits_say(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    trie = TokenTrie.from_paths(PATHS[kind](rng, int(rng.integers(2, 90))))
    inner = np.arange(trie.num_inner)
    edges = [trie.children(int(node)) for node in inner]
    for width in (1, 3, 50):
        limits = StepLimits.of(trie, width)
        for depth in np.unique(trie.arrays.node_depth[: trie.num_inner]):
            here = inner[trie.arrays.node_depth[: trie.num_inner] == depth]
            children = sorted((len(edges[node][0]) for node in here), reverse=True)[:width]
            assert sum(children) + width - len(children) <= limits.columns
            # positions below num_nodes are nodes: one token further, not on the way
            leaves = [(edges[node][1] >= trie.num_inner) & (edges[node][1] < trie.num_nodes) for node in here]
            ends = sum(sorted((int(one.sum()) for one in leaves), reverse=True)[:width])
            enough = 2 * width if ends <= width else width + 1 + ends
            assert limits.ranked >= min(enough, limits.columns)
    tight = max(StepLimits.of(trie, 1).columns, 1)
    assert tight == max(len(tokens) for tokens, _ in edges)


def test_a_model_that_returns_nan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = TableLM(VOCAB)
    monkeypatch.setattr(lm, "edge_logprobs", lambda rows, position_E, *_: torch.full((len(position_E),), torch.nan))
    monkeypatch.setitem(select_dense._DENSE, "cpu", True)
    with pytest.raises(TawinError, match="NaN"):
        each_alone(lm, TokenRows.from_lists([[3]]), TokenTrie.from_paths([[1, EOS], [2, EOS]]), 2)


def test_a_cpu_keeps_the_form_that_does_least_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_dense, "step", None)
    assert select_dense._DENSE == {"cpu": False}
    lm, trie = FixedTableLM(VOCAB), TokenTrie.from_paths([[1, EOS], [2, EOS]])
    each_alone(lm, TokenRows.from_lists([[3]]), trie, 2)
    assert lm.scored


def test_counting_sees_launches_and_syncs() -> None:
    with Launches() as mode:
        values = torch.arange(6).view(2, 3)[:, 1:]
        assert (mode.count.launches, mode.count.syncs) == (1, 0)
        int((values + 1).sum())
        values[values > 2]
    assert mode.count.syncs == 2
    assert mode.count.names["sync _local_scalar_dense"] == 1
