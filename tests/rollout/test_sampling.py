"""Constrained draws: their frequencies, their log-probs, and what a prompt's draws depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_lm import HfLM, exhaustive_logprobs, random_qwen2
from scipy import stats
from transformers import PreTrainedModel

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.sampling import constrained_sample
from tawin_nemo.types import NO_ITEM, TokenRows
from tawin_nemo.util.errors import ConfigError

VOCAB, EOS = 40, 0
TOLERANCE = 1e-5  # float32 against a full forward pass
PATHS = [[1, 2, EOS], [1, 2, 5, 5, EOS], [1, 3, EOS], [4, EOS], [4, 4, 4, EOS], [6, 7, 8, EOS], [1, 3, EOS]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_qwen2(VOCAB)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tempered_path_probabilities(
    model: PreTrainedModel, prompt: list[int], trie: TokenTrie, temperature: float
) -> dict[int, float]:
    """P(path) as the product of softmax(logits of the children / temperature) along it, by leaf."""
    probabilities = {}
    with torch.no_grad():
        for leaf in sorted(set(trie.leaf_I.tolist())):
            path, node, probability = PATHS[int(trie.items(leaf)[0])], trie.root, 1.0
            for place, token in enumerate(path):
                logits_V = model(torch.tensor([prompt + path[:place]])).logits[0, -1]
                tokens = trie.children(node)[0].tolist()
                probability *= float((logits_V[tokens] / temperature).softmax(-1)[tokens.index(token)])
                node = trie.step(node, token)
            probabilities[leaf] = probability
    return probabilities


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_frequencies_match_the_path_probabilities(model: PreTrainedModel, temperature: float) -> None:
    trie, draws = TokenTrie.from_paths(PATHS), 20_000
    prompts = TokenRows.from_lists([[4, 9], [3, 3, 12]])
    found = constrained_sample(HfLM(model), prompts, trie, draws, generators=generators(1, 2), temperature=temperature)
    for row in range(len(prompts)):
        probabilities = tempered_path_probabilities(model, prompts[row].tolist(), trie, temperature)
        assert sum(probabilities.values()) == pytest.approx(1.0, abs=TOLERANCE)
        expected = np.array(list(probabilities.values())) / sum(probabilities.values()) * draws
        observed = np.array([(found.leaf_BW[row] == leaf).sum() for leaf in probabilities])
        likely = expected >= 5  # the usual condition of the chi-square test
        assert likely.sum() >= 3
        pooled = [*expected[likely], expected[~likely].sum()], [*observed[likely], observed[~likely].sum()]
        if likely.all():
            pooled = pooled[0][:-1], pooled[1][:-1]
        assert stats.chisquare(pooled[1], pooled[0]).pvalue > 0.001
        wrong = expected[::-1].copy()
        assert stats.chisquare(observed, wrong).pvalue < 1e-6  # the test would notice another distribution


def test_logprobs_are_those_of_temperature_one_best_first(model: PreTrainedModel) -> None:
    trie, prompt = TokenTrie.from_paths(PATHS), [4, 9]
    found = constrained_sample(
        HfLM(model), TokenRows.from_lists([prompt]), trie, 40, generators=generators(3), temperature=3.0
    )
    leaves = sorted(set(trie.leaf_I.tolist()))
    exact = dict(zip(leaves, exhaustive_logprobs(model, prompt, trie, "trie"), strict=True))
    assert (found.scores_BW[0].diff() <= 0).all()
    assert len(set(found.leaf_BW[0].tolist())) < 40  # with replacement
    for place in range(40):
        leaf, length = int(found.leaf_BW[0, place]), int(found.lengths_BW[0, place])
        np.testing.assert_allclose(found.logprobs_BWT[0, place, :length], exact[leaf], rtol=0, atol=TOLERANCE)
        assert float(found.scores_BW[0, place]) == pytest.approx(sum(exact[leaf]), abs=TOLERANCE)
        assert found.tokens_BWT[0, place, :length].tolist() == PATHS[int(found.items_BW[0, place])]
    assert (found.items_BW != NO_ITEM).all()


def test_draws_depend_on_their_own_generator_only(model: PreTrainedModel) -> None:
    trie = TokenTrie.from_paths(PATHS)
    pair = TokenRows.from_lists([[4, 9], [3, 3, 12]])
    both = constrained_sample(HfLM(model), pair, trie, 30, generators=generators(7, 8))
    alone = constrained_sample(HfLM(model), pair.take(np.array([1])), trie, 30, generators=generators(8))
    other = constrained_sample(HfLM(model), pair.take(np.array([1])), trie, 30, generators=generators(9))
    assert both.leaf_BW[1].tolist() == alone.leaf_BW[0].tolist()
    assert both.leaf_BW[1].tolist() != other.leaf_BW[0].tolist()


def test_draws_are_those_of_a_plain_walk() -> None:
    """One number per draw and depth decides by inversion, wherever there is a choice."""
    rng, draws = np.random.default_rng(0), 25
    paths = [[9, 9, *rng.integers(1, 4, rng.integers(1, 9)).tolist(), EOS] for _ in range(40)]
    trie, prompts = TokenTrie.from_paths(paths), TokenRows.from_lists([[4, 9], [3, 3, 12]])
    lm = HfLM(random_qwen2(VOCAB).double())
    found = constrained_sample(lm, prompts, trie, draws, generators=generators(5, 6), temperature=1.5)
    for row, generator in enumerate(generators(5, 6)):
        uniform_NT = torch.rand(draws, trie.decision_depth + 1, generator=generator, dtype=torch.float64)
        leaves = []
        for uniform_T in uniform_NT:
            position, path = trie.root, []
            while not len(trie.items(position)):
                tokens, positions = (array.tolist() for array in trie.children(position))
                place = 0
                if len(tokens) > 1:
                    logp = lm.path_logprobs([*prompts[row].tolist(), *path], tokens, "trie")
                    cumulative = (torch.tensor(logp, dtype=torch.float64) / 1.5).softmax(0).cumsum(0)
                    place = int((cumulative <= uniform_T[len(path)]).sum())
                position, path = positions[place], [*path, tokens[place]]
            leaves.append(position)
        assert sorted(leaves) == sorted(found.leaf_BW[row].tolist())


def test_draws_that_agree_share_a_row_of_the_model(model: PreTrainedModel) -> None:
    trie, lm = TokenTrie.from_paths(PATHS), HfLM(model)
    constrained_sample(lm, TokenRows.from_lists([[4, 9], [3]]), trie, 500, generators=generators(1, 2))
    assert len(lm.ran) == 2 * 3  # two prompts; below the root only 1, 1-2 and 4 leave something to decide


def test_one_path_needs_no_decision(model: PreTrainedModel) -> None:
    trie, lm = TokenTrie.from_paths([[5, 6, EOS], [5, 6, EOS]]), HfLM(model)
    found = constrained_sample(lm, TokenRows.from_lists([[4, 9]]), trie, 3, generators=generators(1))
    assert found.items_BW.tolist() == [[0, 0, 0]]
    assert found.tokens_BWT[0, 0].tolist() == [5, 6, EOS]
    assert not found.scores_BW.any()
    assert lm.extensions == 0


def test_unusable_arguments_are_refused(model: PreTrainedModel) -> None:
    trie, prompt = TokenTrie.from_paths(PATHS), TokenRows.from_lists([[4]])
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="temperature"):
            constrained_sample(HfLM(model), prompt, trie, 2, generators=generators(1), temperature=temperature)
    with pytest.raises(ConfigError, match="0"):
        constrained_sample(HfLM(model), prompt, trie, 0, generators=generators(1))
    with pytest.raises(ConfigError, match="generators"):
        constrained_sample(HfLM(model), prompt, trie, 2, generators=generators(1, 2))
    assert constrained_sample(HfLM(model), TokenRows.from_lists([]), trie, 2, generators=[]).items_BW.shape == (0, 2)
