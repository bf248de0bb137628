"""Prompts with their own widths and filters in one search: each gets what the slow oracle finds for it alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_lm import TableLM
from token_synchronous import token_synchronous_search

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.beam import BeamSearch
from tawin_nemo.rollout.filters import Filters, ItemFilter
from tawin_nemo.types import NO_ITEM, TokenRows
from tawin_nemo.util.errors import ConfigError

VOCAB, EOS = 50, 0


@dataclass(frozen=True)
class Wish:
    """One prompt with what it asks for."""

    prompt: list[int]
    width: int
    kind: str | None  # None: no filter
    listed: frozenset[int]

    def allows(self, item: int) -> bool:
        return self.kind is None or (item in self.listed) == (self.kind == "only")

    def allows_below(self, start: list[int], paths: list[list[int]]) -> bool:
        return any(self.allows(item) and path[: len(start)] == start for item, path in enumerate(paths))

    def filter(self, trie: TokenTrie) -> ItemFilter | None:
        if self.kind is None:
            return None
        return ItemFilter(self.kind, np.sort(trie.spans.rank_I[sorted(self.listed)]))


@st.composite
def catalogs(draw: st.DrawFn) -> list[list[int]]:
    bodies = st.lists(st.integers(1, 4), max_size=4)
    return [[*body, EOS] for body in draw(st.lists(bodies, min_size=1, max_size=14))]


@st.composite
def wishes(draw: st.DrawFn, items: int) -> Wish:
    return Wish(
        prompt=draw(st.lists(st.integers(10, 49), min_size=1, max_size=3)),
        width=draw(st.integers(1, 6) | st.just(items)),
        kind=draw(st.sampled_from([None, "only", "except"])),
        listed=draw(st.frozensets(st.integers(0, items - 1))),
    )


def oracle(wish: Wish, paths: list[list[int]], trie: TokenTrie, lm: TableLM, space: str) -> list[tuple[int, float]]:
    """(leaf, score) of the search in which a token that leads to no allowed item has probability 0."""

    def logprobs(path: tuple[int, ...], tokens: list[int]) -> list[float]:
        values = lm.path_logprobs((*wish.prompt, *path), tokens, space)
        return [
            value if wish.allows_below([*path, token], paths) else -math.inf
            for token, value in zip(tokens, values, strict=True)
        ]

    found = token_synchronous_search(logprobs, trie, wish.width)
    return [(path.position, path.score) for path in found]


@settings(max_examples=300)
@given(st.data(), catalogs(), st.sampled_from(["trie", "vocab"]), st.integers(0, 1000))
def test_each_prompt_gets_what_it_would_get_alone(
    data: st.DataObject, paths: list[list[int]], space: str, seed: int
) -> None:
    asked = data.draw(st.lists(wishes(len(paths)), min_size=1, max_size=5))
    arrivals = iter(data.draw(st.lists(st.integers(0, 2), max_size=6)))
    dropped = data.draw(st.frozensets(st.integers(0, len(asked) - 1), max_size=2))
    trie, lm = TokenTrie.from_paths(paths), TableLM(VOCAB, seed=seed)
    running, came, answers, lost = BeamSearch(lm, trie, 1, score_space=space), 0, {}, {}
    while came < len(asked) or running.running:
        upto = min(len(asked), came + next(arrivals, len(asked)))
        part = asked[came:upto]
        if part:
            running.admit(
                TokenRows.from_lists([wish.prompt for wish in part]), np.arange(came, upto),
                widths=[wish.width for wish in part], filters=[wish.filter(trie) for wish in part],
            )  # fmt: skip
            running.drop(dropped & set(range(came, upto)))
        came = upto
        answer = running.advance()
        for row, ticket in enumerate(answer.ticket_B.tolist()):
            leaves, scores = answer.candidates.leaf_BW[row].tolist(), answer.candidates.scores_BW[row].tolist()
            answers[ticket] = [(leaf, score) for leaf, score in zip(leaves, scores, strict=True) if leaf >= 0]
            lost[ticket] = float(answer.pruned_score_B[row])
    assert running.cache_tokens == 0
    assert answers.keys() == set(range(len(asked))) - dropped
    for ticket, found in answers.items():
        assert found == oracle(asked[ticket], paths, trie, lm, space)
        everything = oracle(replace(asked[ticket], width=len(paths) + 1), paths, trie, lm, space)
        proven = [score for _, score in found if score >= lost[ticket]]
        assert proven == [score for _, score in everything[: len(proven)]]
        if lost[ticket] == -math.inf:
            assert len(found) == min(len(everything), asked[ticket].width)
        if asked[ticket].width >= len(everything) > 0 and asked[ticket].width >= len(paths):
            assert lost[ticket] == -math.inf


def test_with_enough_beams_a_filter_gives_the_exact_ranking_of_what_it_allows() -> None:
    rng = np.random.default_rng(3)
    paths = [[*rng.integers(1, 5, rng.integers(1, 6)).tolist(), EOS] for _ in range(80)]
    trie, lm = TokenTrie.from_paths(paths), TableLM(VOCAB, impossible=False)
    allowed = set(rng.choice(80, 30, replace=False).tolist())
    given = ItemFilter.only(trie, allowed)
    search = BeamSearch(lm, trie, given.allowed_paths(trie))
    search.admit(TokenRows.from_lists([[10, 11]]), [0], filters=[given])
    while search.running:
        found = search.advance().candidates
    whole = BeamSearch(lm, trie, trie.num_leaves)
    whole.admit(TokenRows.from_lists([[10, 11]]), [0])
    while whole.running:
        everything = whole.advance().candidates
    score_of = dict(zip(everything.leaf_BW[0].tolist(), everything.scores_BW[0].tolist(), strict=True))
    leaves = {int(trie.leaf_I[item]) for item in allowed}
    assert len(leaves) == given.allowed_paths(trie) < 30  # some of them share a path
    assert set(found.leaf_BW[0].tolist()) == leaves
    expected = sorted((score_of[leaf] for leaf in leaves), reverse=True)
    assert found.scores_BW[0].tolist() == expected  # quarters: exact, and not normalised over the allowed ones


def test_an_item_beside_a_forbidden_one_on_the_same_path_is_still_found() -> None:
    paths = [[1, EOS], [2, EOS], [2, EOS], [3, EOS]]
    trie = TokenTrie.from_paths(paths)
    leaf = int(trie.leaf_I[1])
    assert ItemFilter.without(trie, [1]).first_allowed(trie, leaf) == 2
    assert ItemFilter.only(trie, [2, 3]).first_allowed(trie, leaf) == 2
    assert ItemFilter.without(trie, [1, 2]).allowed_paths(trie) == 2
    assert ItemFilter.without(trie, [1]).allowed_paths(trie) == 3
    blocked = Filters(trie, [ItemFilter.without(trie, [1, 2]), ItemFilter.only(trie, [1])], torch.device("cpu"))
    rows = torch.tensor([0, 1, -1])
    assert blocked.blocked(rows, torch.full((3,), leaf)).tolist() == [True, False, False]


def test_a_filter_that_allows_nothing_gives_nothing() -> None:
    trie, lm = TokenTrie.from_paths([[1, EOS], [2, EOS]]), TableLM(VOCAB)
    search = BeamSearch(lm, trie, 2)
    search.admit(TokenRows.from_lists([[10]]), [4], filters=[ItemFilter.only(trie, [])])
    answer = search.advance()
    assert answer.ticket_B.tolist() == [4]
    assert (answer.candidates.items_BW == NO_ITEM).all()
    assert not search.running


def test_a_prompt_without_beams_is_refused() -> None:
    search = BeamSearch(TableLM(VOCAB), TokenTrie.from_paths([[1, EOS]]), 2)
    with pytest.raises(ConfigError, match="at least one beam"):
        search.admit(TokenRows.from_lists([[10], [11]]), [0, 1], widths=[1, 0])


@given(catalogs())
def test_spans_say_what_lies_below_and_above_every_node(paths: list[list[int]]) -> None:
    trie = TokenTrie.from_paths(paths)
    spans, order = trie.spans, np.argsort(trie.spans.rank_I)
    below = {node: set(trie.items(node).tolist()) for node in set(trie.leaf_I.tolist())}
    above = dict.fromkeys(range(trie.num_inner + trie.num_items), 0)
    offsets, children = trie.arrays.child_offsets.tolist(), trie.arrays.child_nodes.tolist()
    for node in range(trie.num_inner):
        for child in children[offsets[node] : offsets[node + 1]]:
            above[child] = above[node] + 1
    for node in reversed(range(trie.num_inner)):
        below[node] = set().union(*(below[child] for child in children[offsets[node] : offsets[node + 1]]))
    for node, items in below.items():
        assert set(order[spans.first_V[node] : spans.end_V[node]].tolist()) == items
        assert int(spans.choices_V[node]) == above[node]
