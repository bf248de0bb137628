"""Constrained beam search against transformers' generate and against the exhaustive ranking of the catalog."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_lm import (
    HfLM,
    double_precision_generate,
    exhaustive_logprobs,
    leaves_of,
    random_qwen2,
    transformers_search,
)
from rankings import EXACT, SCORE_TOLERANCE, assert_same_ranking, found_ranking
from transformers import PreTrainedModel

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.beam import constrained_beam_search
from tawin_nemo.rollout.beam_state import VOCAB_CHAIN
from tawin_nemo.types import NO_ITEM, Candidates, TokenRows
from tawin_nemo.util.errors import CatalogError, ConfigError, DataError, TawinError

VOCAB, EOS = 40, 0


def random_paths(rng: np.random.Generator, items: int, *, tokens: int = 6, longest: int = 6) -> list[list[int]]:
    """Few tokens and mixed lengths: shared prefixes, EOS at inner nodes, forced tails and equal paths all occur."""
    body = [rng.integers(1, tokens + 1, rng.integers(1, longest)).tolist() for _ in range(items)]
    return [[*path, EOS] for path in body]


def random_prompts(rng: np.random.Generator, rows: int, vocab: int = VOCAB) -> TokenRows:
    return TokenRows.from_lists([rng.integers(1, vocab, rng.integers(1, 9)).tolist() for _ in range(rows)])


def check_against_transformers(
    model: PreTrainedModel,
    trie: TokenTrie,
    prompts: TokenRows,
    width: int,
    space: str,
    penalty: float,
    tolerance: float,
) -> Candidates:
    found = constrained_beam_search(HfLM(model), prompts, trie, width, score_space=space, length_penalty=penalty)
    expected = transformers_search(model, prompts, trie, width, eos=EOS, space=space, penalty=penalty)
    for row in range(len(prompts)):
        assert_same_ranking(found_ranking(found, row), expected[row], tolerance)
    return found


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_qwen2(VOCAB)


@pytest.fixture(scope="module")
def double_model() -> PreTrainedModel:
    return random_qwen2(VOCAB, seed=1).double()


@pytest.mark.parametrize("space", ["trie", "vocab"])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize(("items", "width"), [(1, 3), (12, 2), (60, 6), (9, 14)])
def test_beam_equals_transformers_in_float32(
    model: PreTrainedModel, space: str, penalty: float, items: int, width: int
) -> None:
    rng = np.random.default_rng(items * 100 + width)
    trie = TokenTrie.from_paths(random_paths(rng, items))
    check_against_transformers(model, trie, random_prompts(rng, 4), width, space, penalty, SCORE_TOLERANCE)


@pytest.mark.parametrize("space", ["trie", "vocab"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -0.7])
@pytest.mark.parametrize("seed", range(4))
def test_beam_equals_transformers_exactly_in_float64(
    double_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, space: str, penalty: float, seed: int
) -> None:
    double_precision_generate(monkeypatch)
    rng = np.random.default_rng(seed)
    trie = TokenTrie.from_paths(random_paths(rng, int(rng.integers(2, 120)), tokens=int(rng.integers(2, 9))))
    found = check_against_transformers(
        double_model, trie, random_prompts(rng, 5), int(rng.integers(2, 12)), space, penalty, EXACT
    )
    assert found.scores_BW.dtype == torch.float64


@pytest.mark.parametrize("space", ["trie", "vocab"])
@pytest.mark.parametrize("penalty", [0.0, 0.8])
@pytest.mark.parametrize("extra", [0, 7])
def test_as_many_beams_as_paths_give_the_exhaustive_ranking(
    double_model: PreTrainedModel, space: str, penalty: float, extra: int
) -> None:
    rng = np.random.default_rng(5)
    trie = TokenTrie.from_paths(random_paths(rng, 40))
    prompts = random_prompts(rng, 3)
    width = trie.num_leaves + extra
    found = constrained_beam_search(HfLM(double_model), prompts, trie, width, score_space=space, length_penalty=penalty)
    leaves = leaves_of(trie)
    for row in range(len(prompts)):
        logprobs = exhaustive_logprobs(double_model, prompts[row].tolist(), trie, space)
        scores = np.array([sum(path) / len(path) ** penalty for path in logprobs])
        order = np.argsort(-scores)
        assert found.leaf_BW[row].tolist() == [leaves[place] for place in order] + [-1] * extra
        np.testing.assert_allclose(found.scores_BW[row, : len(order)], scores[order], rtol=0, atol=EXACT)
        for place, best in enumerate(order):
            length = int(found.lengths_BW[row, place])
            np.testing.assert_allclose(found.logprobs_BWT[row, place, :length], logprobs[best], rtol=0, atol=EXACT)
            assert not found.logprobs_BWT[row, place, length:].any()
        if space == "trie":
            assert np.exp(found.logprobs_BWT[row].sum(-1))[: len(order)].sum() == pytest.approx(1.0, abs=EXACT)


@torch.no_grad()
@pytest.mark.parametrize("space", ["trie", "vocab"])
def test_one_beam_is_greedy(model: PreTrainedModel, space: str) -> None:
    rng = np.random.default_rng(3)
    trie = TokenTrie.from_paths(random_paths(rng, 50))
    prompts = random_prompts(rng, 4)
    found = constrained_beam_search(HfLM(model), prompts, trie, 1, score_space=space)
    for row in range(len(prompts)):
        node, path = trie.root, []
        while len(trie.children(node)[0]):
            tokens, nodes = trie.children(node)
            logits_V = model(torch.tensor([prompts[row].tolist() + path])).logits[0, -1]
            best = int(logits_V[torch.from_numpy(tokens)].argmax())
            path, node = [*path, int(tokens[best])], int(nodes[best])
        assert found.leaf_BW[row].tolist() == [node]


def test_forced_tokens_score_exactly_zero_in_trie_space(model: PreTrainedModel) -> None:
    trie = TokenTrie.from_paths([[3, 7, 7, 1, EOS], [3, 7, 2, 2, 2, EOS], [5, 5, EOS]])
    found = constrained_beam_search(HfLM(model), TokenRows.from_lists([[4, 9]]), trie, 3)
    for path, logprobs in zip(found.tokens_BWT[0].tolist(), found.logprobs_BWT[0].tolist(), strict=True):
        forced = {5: [1, 2], 3: [1, 3, 4, 5]}[path[0]]
        assert [logprobs[place] for place in forced] == [0.0] * len(forced)
        assert logprobs[0] < 0


def test_beams_below_their_last_choice_are_not_run_in_trie_space(model: PreTrainedModel) -> None:
    trie = TokenTrie.from_paths([[first, 1, 2, 3, 4, EOS] for first in range(5, 11)])
    for space, calls, tokens in [("trie", 0, 0), ("vocab", 1, 2 * 6 * 5)]:
        lm = HfLM(model)
        found = constrained_beam_search(lm, TokenRows.from_lists([[4, 9], [3]]), trie, 6, score_space=space)
        assert (found.items_BW != NO_ITEM).all()
        assert (lm.extensions, len(lm.ran)) == (calls, tokens)


def test_a_chain_runs_a_limited_number_of_tokens_ahead_in_vocab_space(model: PreTrainedModel) -> None:
    lm, trie = HfLM(model), TokenTrie.from_paths([[5, *range(1, 20), EOS], [6, EOS]])
    found = constrained_beam_search(lm, TokenRows.from_lists([[4, 9]]), trie, 1, score_space="vocab")
    assert lm.extensions == (-(-20 // VOCAB_CHAIN) if found.items_BW[0, 0] == 0 else 1)
    assert len(lm.ran) == (20 if found.items_BW[0, 0] == 0 else 1)


def flat_model() -> PreTrainedModel:
    """All weights zero: every token has the same log-prob."""
    model = random_qwen2(VOCAB)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model


def test_hopeless_beams_are_dropped() -> None:
    """In vocab space every token costs: once two short titles are done, the long one cannot overtake them."""
    trie = TokenTrie.from_paths([[1, EOS], [2, EOS], [2, *[3] * 400, EOS]])
    lm = HfLM(flat_model())
    found = constrained_beam_search(lm, TokenRows.from_lists([[4, 9]]), trie, 2, score_space="vocab")
    assert found.items_BW.tolist() == [[0, 1]]
    assert lm.extensions == 1


def test_items_on_one_path_come_once_as_their_first_item(model: PreTrainedModel) -> None:
    trie = TokenTrie.from_paths([[2, EOS], [1, EOS], [2, EOS], [1, 3, EOS]])
    found = constrained_beam_search(HfLM(model), TokenRows.from_lists([[4]]), trie, 4)
    assert sorted(found.items_BW[0].tolist()) == [NO_ITEM, 0, 1, 3]
    assert found.items_BW[0, -1] == NO_ITEM
    assert found.scores_BW[0, -1] == -torch.inf
    assert found.lengths_BW[0, -1] == 0
    assert found.leaf_BW[0, -1] == -1


def test_equal_scores_are_ordered_by_token() -> None:
    trie = TokenTrie.from_paths([[9, EOS], [4, EOS], [6, EOS], [5, EOS]])
    found = constrained_beam_search(HfLM(flat_model()), TokenRows.from_lists([[4]] * 2), trie, 3)
    assert found.items_BW.tolist() == [[1, 3, 2]] * 2


def test_no_prompts_give_no_candidates(model: PreTrainedModel) -> None:
    trie = TokenTrie.from_paths([[2, EOS], [1, 3, EOS]])
    found = constrained_beam_search(HfLM(model), TokenRows.from_lists([]), trie, 2)
    assert found.items_BW.shape == (0, 2)
    assert found.logprobs_BWT.shape == (0, 2, 3)


def test_unusable_arguments_are_refused(model: PreTrainedModel) -> None:
    trie, prompt = TokenTrie.from_paths([[2, EOS], [1, 3, EOS]]), TokenRows.from_lists([[4]])
    for width in (0, -2):
        with pytest.raises(ConfigError, match=str(width)):
            constrained_beam_search(HfLM(model), prompt, trie, width)
    with pytest.raises(ConfigError, match="joint"):
        constrained_beam_search(HfLM(model), prompt, trie, 1, score_space="joint")
    with pytest.raises(DataError, match="row 1"):
        constrained_beam_search(HfLM(model), TokenRows.from_lists([[4], []]), trie, 1)
    for token in (-1, VOCAB):
        with pytest.raises(DataError, match=rf"prompt row 1 has token {token}, the model's are 0 .. {VOCAB - 1}"):
            constrained_beam_search(HfLM(model), TokenRows.from_lists([[4], [5, token], [token]]), trie, 1)
    with pytest.raises(DataError, match=r"row 2 has 2047 tokens, .* 3, .* takes 2048 .*data.max_prompt_tokens .*2045"):
        constrained_beam_search(HfLM(model), TokenRows.from_lists([[4], [5], [1] * 2047]), trie, 1)
    with pytest.raises(CatalogError, match=f"token {VOCAB}"):
        constrained_beam_search(HfLM(model), prompt, TokenTrie.from_paths([[VOCAB, EOS]]), 1)


def test_nan_logits_are_an_error() -> None:
    model = random_qwen2(VOCAB)
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    trie = TokenTrie.from_paths([[2, EOS], [1, 3, EOS]])
    with pytest.raises(TawinError, match="NaN"):
        constrained_beam_search(HfLM(model), TokenRows.from_lists([[4]]), trie, 1)
