"""Token trees against their definition: every needed beginning once, who sees what, and what is scored."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.data.trees import tree_batch, tree_batches, tree_sizes
from tawin_nemo.types import TokenBatch, TokenRows
from tawin_nemo.util.errors import CatalogError
from tests.data.tree_oracle import dense_places, expected_prefixes, expected_scores, scored_tokens

EOS = 1
#: Shared beginnings, forced stretches at the start, in the middle and at the end, two items on one path.
PATHS = [[5, 6, 2, EOS], [5, 6, 3, 4, 4, EOS], [5, 6, 3, 7, EOS], [5, 6, 3, 4, 4, EOS], [5, 8, EOS], [9, 9, 9, EOS]]
#: Everything begins with 5, 6; one path is alone in its catalog.
STEMMED, ALONE = PATHS[:4], PATHS[1:2]

rows = TokenRows.from_lists


@st.composite
def catalogs(draw: st.DrawFn) -> list[list[int]]:
    """Prefix-free paths over few tokens, so that they share a lot."""
    body = st.lists(st.integers(2, 4), min_size=1, max_size=6)
    stem = draw(st.lists(st.integers(2, 4), max_size=2))
    return [[*stem, *path, EOS] for path in draw(st.lists(body, min_size=1, max_size=12))]


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[list[int]], np.ndarray]:
    """A catalog, prompts, and a ragged group of its paths for each prompt, some of them twice."""
    catalog = draw(st.one_of(st.sampled_from([PATHS, STEMMED, ALONE]), catalogs()))
    prompts = draw(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=5), max_size=4))
    picks = [draw(st.lists(st.integers(0, len(catalog) - 1), min_size=1, max_size=9)) for _ in prompts]
    answers = [catalog[item] for pick in picks for item in pick]
    return catalog, prompts, answers, np.repeat(np.arange(len(prompts)), [len(pick) for pick in picks])


def check_layout(batch: TokenBatch, needed: list[set[tuple[int, ...]]], prompts: list[list[int]]) -> None:
    """One token per needed beginning, each with its depth, subtree and block; places where something is read."""
    tokens, ends = batch.tokens_S.tolist(), batch.end_S.tolist()
    starts = [0, *torch.cumsum(batch.chain_B + batch.tree_B, 0).tolist()]
    assert starts[-1] == len(tokens) == len(ends) == len(batch.position_S)
    for (start, stop), chain, beginnings, prompt in zip(
        pairwise(starts), batch.chain_B.tolist(), needed, prompts, strict=True
    ):
        # the path of token i: the tokens of its block that see it in their subtree
        paths = [tuple(tokens[j] for j in range(start, i + 1) if i < ends[j]) for i in range(start, stop)]
        assert len(paths) == len(set(paths)) == len(beginnings)
        assert set(paths) == beginnings
        assert batch.position_S[start:stop].tolist() == [len(path) - 1 for path in paths]
        for i, path in enumerate(paths):
            below = [j for j, other in enumerate(paths) if other[: len(path)] == path]
            assert below == list(range(i, ends[start + i] - start))
        assert tokens[start : start + len(prompt)] == prompt
        # a chain ends where the beginnings fork, or with them
        forks = [i for i in range(stop - start) if ends[start + i] < stop]
        assert chain == min(forks, default=stop - start)
    places = batch.index_P.tolist()
    assert places == sorted(set(places))
    assert sorted(set(batch.row_N.tolist())) == list(range(len(places)))


@pytest.mark.parametrize("space", ["vocab", "trie"])
@settings(max_examples=150)
@given(case=groups())
def test_trees_equal_their_definition(space: str, case):
    catalog, prompts, answers, prompt_A = case
    known = catalog if space == "trie" else None
    trie = TokenTrie.from_paths(catalog) if space == "trie" else None
    batch, index = tree_batch(rows(prompts), rows(answers), prompt_A, trie)
    assert scored_tokens(batch, index) == expected_scores(prompts, answers, prompt_A, known)
    check_layout(batch, expected_prefixes(prompts, answers, prompt_A, known), prompts)
    sizes_B = tree_sizes(rows(prompts), rows(answers), prompt_A, trie)
    assert sizes_B.tolist() == (batch.chain_B + batch.tree_B).tolist()
    if batch.children is not None:
        edges = batch.children
        assert edges.token_E[edges.chosen_N].tolist() == batch.target_N.tolist()
        assert edges.position_E[edges.chosen_N].tolist() == batch.row_N.tolist()
        assert (edges.position_E.diff() >= 0).all()
    for name, value in vars(batch).items():
        assert name == "children" or (value.dtype == torch.int64 and value.device.type == "cpu"), name


@settings(max_examples=50)
@given(case=groups())
def test_a_tree_asks_what_repeated_prompts_ask(case):
    """The same batch with every answer behind its own copy of the prompt: chains, and the same log-probs."""
    catalog, prompts, answers, prompt_A = case
    trie = TokenTrie.from_paths(catalog)
    for space in (None, trie):
        tree = tree_batch(rows(prompts), rows(answers), prompt_A, space)
        chains = tree_batch(rows(prompts).take(prompt_A), rows(answers), np.arange(len(answers)), space)
        assert scored_tokens(*tree) == scored_tokens(*chains)
        assert not chains[0].tree_B.any()
        assert len(tree[0].tokens_S) <= len(chains[0].tokens_S)


def test_answers_of_any_kind_in_vocab_space():
    """Without a trie an answer may be the beginning of another one, or empty."""
    prompts, answers = [[7], [8, 8]], [[5], [5, 6], [5, 6, 7], [], [5, 6], [5], [4]]
    prompt_A = np.array([0, 0, 0, 0, 1, 1, 1])
    batch, index = tree_batch(rows(prompts), rows(answers), prompt_A, None)
    assert scored_tokens(batch, index) == expected_scores(prompts, answers, prompt_A, None)
    check_layout(batch, expected_prefixes(prompts, answers, prompt_A, None), prompts)


def test_one_tree_spelled_out():
    """Root {5, 9}, node 5 {6, 8}, node 56 {2, 3}, node 563 {4, 7}: four candidates, one of them twice."""
    trie = TokenTrie.from_paths(PATHS)
    answers = rows([PATHS[item] for item in (4, 1, 0, 2, 1)])
    batch, index = tree_batch(rows([[2, 2]]), answers, np.zeros(5, np.int64), trie)
    assert batch.tokens_S.tolist() == [2, 2, 5, 6, 3]
    assert batch.position_S.tolist() == [0, 1, 2, 3, 4]
    assert batch.end_S.tolist() == [5, 5, 5, 5, 5]  # all choices lie on one path: nothing forks
    assert (batch.chain_B.tolist(), batch.tree_B.tolist()) == ([5], [0])
    assert batch.index_P.tolist() == [1, 2, 3, 4]
    assert index.answer_N.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert index.token_N.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.row_N.tolist() == index.token_N.tolist()
    assert batch.children is not None
    assert batch.children.token_E.tolist() == [5, 9, 6, 8, 2, 3, 4, 7]
    # vocab space runs the tails as well, up to their last token
    batch, _ = tree_batch(rows([[2, 2]]), answers, np.zeros(5, np.int64), None)
    assert batch.tokens_S.tolist() == [2, 2, 5, 6, 2, 3, 4, 4, 7, 8]
    assert batch.end_S.tolist() == [10, 10, 10, 9, 5, 9, 8, 8, 9, 10]
    assert (batch.chain_B.tolist(), batch.tree_B.tolist()) == ([3], [7])


def test_a_single_answer_is_a_chain():
    batch, _ = tree_batch(rows([[2, 3], [4]]), rows([PATHS[1]] * 3), np.array([0, 0, 1]), None)
    assert batch.tokens_S.tolist() == [2, 3, *PATHS[1][:-1], 4, *PATHS[1][:-1]]
    assert (batch.chain_B.tolist(), batch.tree_B.tolist()) == ([7, 6], [0, 0])


def test_a_catalog_of_one_item_has_nothing_to_score():
    batch, index = tree_batch(rows([[2, 3]]), rows(ALONE), np.zeros(1, np.int64), TokenTrie.from_paths(ALONE))
    assert len(batch.index_P) == len(batch.row_N) == len(index.answer_N) == 0
    assert batch.tokens_S.tolist() == [2, 3]
    assert batch.children is not None
    assert len(batch.children.token_E) == 0


def test_no_prompts():
    for trie in (None, TokenTrie.from_paths(PATHS)):
        batch, index = tree_batch(rows([]), rows([]), np.zeros(0, np.int64), trie)
        assert len(batch.tokens_S) == len(batch.chain_B) == len(batch.row_N) == len(index.token_N) == 0
        assert tree_batches(rows([]), rows([]), np.zeros(0, np.int64), trie, 10) == []


@settings(max_examples=50)
@given(case=groups(), budget=st.integers(1, 60))
def test_parts_under_a_budget_are_the_whole(case, budget: int):
    catalog, prompts, answers, prompt_A = case
    trie = TokenTrie.from_paths(catalog)
    found = []
    for batch, index, answer_M in tree_batches(rows(prompts), rows(answers), prompt_A, trie, budget):
        assert len(batch.tokens_S) <= budget or len(batch.chain_B) == 1
        found += [(int(answer_M[a]), *facts) for a, *facts in scored_tokens(batch, index)]
    assert sorted(found) == expected_scores(prompts, answers, prompt_A, catalog)


# -- what is refused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "place"), [([5, 6, 9, EOS], 2), ([5, 8, EOS, EOS], 3), ([8, EOS], 0), ([9, 9, 9, 2], 3), ([9, 2, 9], 1)]
)
def test_answers_off_the_trie_are_refused(answer: list[int], place: int):
    trie, said = TokenTrie.from_paths(PATHS), rf"answer 1 leaves the catalog at its token {place} \({answer[place]}\)"
    for measure in (tree_batch, tree_sizes):
        with pytest.raises(CatalogError, match=said):
            measure(rows([[2], [2]]), rows([PATHS[0], answer, [8, 8, EOS]]), np.array([0, 1, 1]), trie)


@pytest.mark.parametrize("answer", [[5, 6, 3], [9, 9], [5], []])
def test_answers_that_stop_inside_the_catalog_are_refused(answer: list[int]):
    with pytest.raises(CatalogError, match=r"answer 0 is cut short: \["):
        tree_batch(rows([[2]]), rows([answer]), np.zeros(1, np.int64), TokenTrie.from_paths(PATHS))


@pytest.mark.parametrize(
    ("prompts", "prompt_A", "said"),
    [
        ([[2], []], [0, 1], "prompt 1 is empty"),
        ([[2], [2], [2]], [0, 2], "prompt 1 has no answers"),
        ([[2], [2]], [0], "2 answers but 1 entries in prompt_A"),
        ([[2], [2]], [1, 0], "prompt_A must ascend within 0 .. 1"),
        ([[2]], [0, 1], "prompt_A must ascend within 0 .. 0"),
    ],
)
def test_prompts_and_answers_must_fit(prompts: list[list[int]], prompt_A: list[int], said: str):
    with pytest.raises(ValueError, match=said):
        tree_batch(rows(prompts), rows(PATHS[:2]), np.array(prompt_A), None)


def test_dense_places_see_prompt_and_prefix():
    """The oracle of the model's tests, on a batch small enough to read."""
    batch, _ = tree_batch(rows([[7]]), rows([[2, 3, EOS], [2, 4, EOS]]), np.zeros(2, np.int64), None)
    assert [place.tokens for place in dense_places(batch)] == [[7], [7, 2], [7, 2, 3], [7, 2, 4]]
    assert [place.targets for place in dense_places(batch)] == [[2, 2], [3, 4], [EOS], [EOS]]
