"""Beam search against the token-by-token oracle, with scores that tie: exactly the same paths in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hf_lm import HfLM, random_qwen2
from hypothesis import given, settings
from hypothesis import strategies as st
from rankings import EXACT
from sequence_lm import SequenceLM, TableLM
from token_synchronous import Path, token_synchronous_search

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.beam import BeamSearch, collect_candidates
from tawin_nemo.types import Candidates, TokenRows

VOCAB, EOS = 50, 0


@dataclass(frozen=True)
class Case:
    paths: list[list[int]]
    prompts: list[list[int]]
    width: int
    space: str
    penalty: float
    dtype: torch.dtype
    seed: int
    arrivals: list[int]  # prompts that join before each call of the model
    run_ahead: int

    @property
    def trie(self) -> TokenTrie:
        return TokenTrie.from_paths(self.paths)


@st.composite
def catalogs(draw: st.DrawFn) -> list[list[int]]:
    """Few tokens, so that paths share beginnings, repeat and end at nodes with a choice."""
    tokens = st.integers(1, draw(st.integers(1, 5)))
    kind = draw(st.sampled_from(["titles", "long titles", "codes", "mixed codes"]))
    if kind == "codes":
        size = draw(st.integers(1, 3))
        rows = st.lists(tokens, min_size=size, max_size=size)
    elif kind == "mixed codes":  # without an own last token: many paths end at one step, others go on
        rows = st.lists(st.integers(1, 5), min_size=1, max_size=1) | st.lists(st.integers(6, 8), min_size=3, max_size=3)
    else:
        body = st.lists(tokens, min_size=1, max_size=4 if kind == "titles" else 14)
        rows = body.map(lambda tokens: [*tokens, EOS])
    shared = draw(st.lists(st.integers(6, 9), max_size=3))
    return [[*shared, *path] for path in draw(st.lists(rows, min_size=1, max_size=35))]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    paths = draw(catalogs())
    prompts = draw(st.lists(st.lists(st.integers(10, 49), min_size=1, max_size=4), min_size=1, max_size=5))
    penalty = draw(st.sampled_from([0.0, 0.0, 1.0, 0.6, -0.7]))
    return Case(
        paths=paths,
        prompts=prompts,
        width=draw(st.integers(1, 12) | st.just(len(paths) + 2)),
        space=draw(st.sampled_from(["trie", "vocab"])),
        penalty=penalty,
        # quarters and their sums are exact in both types, quotients only in the oracle's
        dtype=draw(st.sampled_from([torch.float32, torch.float64])) if penalty == 0 else torch.float64,
        seed=draw(st.integers(0, 1000)),
        arrivals=draw(st.lists(st.integers(0, 3), max_size=6)),
        run_ahead=draw(st.sampled_from([0, 1, 5, 32])),
    )


def search(case: Case, lm: SequenceLM) -> Candidates:
    """All prompts, joining the search while it runs."""
    prompts, trie = TokenRows.from_lists(case.prompts), case.trie
    running = BeamSearch(
        lm, trie, case.width, score_space=case.space, length_penalty=case.penalty, run_ahead=case.run_ahead
    )
    arrivals, came, answers = iter(case.arrivals), 0, []
    while came < len(prompts) or running.running:
        rows = np.arange(came, min(len(prompts), came + next(arrivals, len(prompts))))
        running.admit(prompts.take(rows), rows)
        came += len(rows)
        answers.append(running.advance())
        assert running.cache_tokens >= running.running
    assert running.cache_tokens == 0
    return collect_candidates(answers, case.width, trie)


def oracle(case: Case, lm: SequenceLM) -> list[list[Path]]:
    return [
        token_synchronous_search(
            lambda path, tokens, prompt=prompt: lm.path_logprobs((*prompt, *path), tokens, case.space),
            case.trie, case.width, case.penalty,
        )
        for prompt in case.prompts
    ]  # fmt: skip


@settings(max_examples=400)
@given(cases())
def test_the_search_equals_the_oracle(case: Case) -> None:
    lm = TableLM(VOCAB, seed=case.seed, dtype=case.dtype)
    found = search(case, lm)
    assert found.scores_BW.dtype == case.dtype
    for row, expected in enumerate(oracle(case, lm)):
        count = len(expected)
        assert found.leaf_BW[row].tolist() == [path.position for path in expected] + [-1] * (case.width - count)
        assert found.scores_BW[row, :count].tolist() == [path.normalised(case.penalty) for path in expected]
        assert (found.scores_BW[row, count:] == -torch.inf).all()
        for place, path in enumerate(expected):
            length = len(path.tokens)
            assert int(found.lengths_BW[row, place]) == length
            assert found.tokens_BWT[row, place].tolist()[:length] == list(path.tokens)
            assert found.logprobs_BWT[row, place].tolist()[:length] == list(path.logprobs)
            assert not found.logprobs_BWT[row, place, length:].any()
            assert int(found.items_BW[row, place]) == case.paths.index(list(path.tokens))


@pytest.mark.parametrize("space", ["trie", "vocab"])
@pytest.mark.parametrize("seed", range(4))
def test_a_real_model_gives_the_oracle_s_results_in_float64(space: str, seed: int) -> None:
    """The same for log-probs of a transformer; prompts of several lengths join one by one."""
    rng = np.random.default_rng(seed)
    bodies = [rng.integers(1, rng.integers(2, 5), rng.integers(1, 8)).tolist() for _ in range(25)]
    lm, reference = HfLM(random_qwen2(VOCAB, seed=seed).double()), HfLM(random_qwen2(VOCAB, seed=seed).double())
    prompts = [rng.integers(10, VOCAB, length).tolist() for length in (5, 1, 9)]
    case = Case(
        [[9, *body, EOS] for body in bodies], prompts, int(rng.integers(1, 9)), space, penalty=0.5 * (seed % 2),
        dtype=torch.float64, seed=seed, arrivals=[1, 1, 1], run_ahead=8,
    )  # fmt: skip
    found = search(case, lm)
    for row, expected in enumerate(oracle(case, reference)):
        count = len(expected)
        assert found.leaf_BW[row].tolist() == [path.position for path in expected] + [-1] * (case.width - count)
        scores = [path.normalised(case.penalty) for path in expected]
        np.testing.assert_allclose(found.scores_BW[row, :count], scores, rtol=0, atol=EXACT)
        for place, path in enumerate(expected):
            logprobs = found.logprobs_BWT[row, place]
            np.testing.assert_allclose(logprobs[: len(path.tokens)], path.logprobs, rtol=0, atol=EXACT)
            assert float(logprobs.sum()) == pytest.approx(path.score, abs=EXACT)


@settings(max_examples=150)
@given(cases())
def test_no_token_is_run_twice_or_in_vain(case: Case) -> None:
    lm = TableLM(VOCAB, seed=case.seed, dtype=case.dtype)
    trie = case.trie
    # prompts that differ, so that equal sequences can be told from tokens that are run twice
    prompts = [[*prompt, 10 + place] for place, prompt in enumerate(case.prompts)]
    search(Case(**{**vars(case), "prompts": prompts}), lm)
    assert len(lm.prefilled) == len(prompts)
    assert len(set(lm.ran)) == len(lm.ran)
    for sequence in lm.ran:
        position = trie.root
        for token in sequence:
            position = trie.step(position, token) if token < 10 else position  # the others are the prompt's
        assert position >= 0
        assert not len(trie.items(position)), "the last token of a path needs no run"
        if case.space == "trie":
            assert leads_to_a_choice(trie, position), "a forced tail needs no run"


def leads_to_a_choice(trie: TokenTrie, position: int) -> bool:
    tokens, positions = trie.children(position)
    while len(tokens) == 1:
        tokens, positions = trie.children(int(positions[0]))
    return len(tokens) > 1


class ListedLM(TableLM):
    """The log-prob of a token is the same everywhere."""

    def path_logprobs(self, sequence: Sequence[int], tokens: list[int], space: str) -> list[float]:
        values = {6: -0.25, 1: -0.5, 2: -0.5, 3: -0.5, 7: -0.75, 4: -5.0, 5: -5.0}
        return [0.0] if len(tokens) == 1 else [values[token] for token in tokens]


def test_beams_that_go_on_are_found_behind_many_that_end() -> None:
    """Codes without an own last token: three of the best four continuations end, and one beam is still missing."""
    trie = TokenTrie.from_paths([[6, 4], [6, 5], [1], [2], [3], [7, 1, 1]])
    search = BeamSearch(ListedLM(VOCAB), trie, 2)
    search.admit(TokenRows.from_lists([[10]]), [0])
    found = search.advance().candidates
    assert found.items_BW.tolist() == [[2, 5]]
    assert found.scores_BW.tolist() == [[-0.5, -0.75]]


def test_chains_that_are_needed_later_fill_a_call_up() -> None:
    """One chain is needed at each of three depths; running ahead takes a single call."""
    paths = [[1, 2, EOS], [1, 3, EOS], [4, 5, 6, EOS], [4, 5, 7, EOS], [8, 8, 8, 8, 1, EOS], [8, 8, 8, 8, 2, EOS]]
    trie, prompts = TokenTrie.from_paths(paths), TokenRows.from_lists([[10]])
    lms = {ahead: TableLM(VOCAB, impossible=False) for ahead in (0, 4, 32)}
    found = []
    for ahead, lm in lms.items():
        running = BeamSearch(lm, trie, 6, run_ahead=ahead)
        running.admit(prompts, [7])
        answers = []
        while running.running:
            answers.append(running.advance())
        assert answers[-1].ticket_B.tolist() == [7]
        found.append(collect_candidates(answers, 6, trie))
    assert all(torch.equal(other.leaf_BW, found[0].leaf_BW) for other in found)
    assert {ahead: lm.extensions for ahead, lm in lms.items()} == {0: 3, 4: 2, 32: 1}
    assert {ahead: len(lm.ran) for ahead, lm in lms.items()} == {0: 7, 4: 7, 32: 7}


@pytest.mark.parametrize("space", ["trie", "vocab"])
def test_prompts_that_are_done_leave_the_cache(space: str) -> None:
    """Ten prompts in a row, at most a few at a time: the cache never holds more than twice the running ones."""
    rng = np.random.default_rng(0)
    trie = TokenTrie.from_paths([[*rng.integers(1, 4, rng.integers(1, 9)).tolist(), EOS] for _ in range(60)])
    lm = TableLM(VOCAB)
    running = BeamSearch(lm, trie, 3, score_space=space)
    one = int(running.max_cache_tokens(np.array([2]))[0])
    for ticket in range(10):
        running.admit(TokenRows.from_lists([[10 + ticket, 11]]), [ticket])
        running.advance()
        assert running.cache_tokens <= 2 * one * max(1, running.running)
    while running.running:
        running.advance()
    assert running.cache_tokens == 0
