"""Distinct candidates out of more draws: the rule against a plain loop, exact log-probs, what the draws depend on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hf_lm import HfLM, exhaustive_logprobs, leaves_of, random_qwen2
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.groups import draws_for, keep_distinct
from tawin_nemo.rollout.sampling import draw_seed
from tawin_nemo.types import Candidates, PromptBatch, TokenRows
from tawin_nemo.util.errors import ConfigError

VOCAB, EOS = 40, 0
TOLERANCE = 1e-10  # float64 against a full forward pass
PATHS = [[1, 2, EOS], [1, 2, 5, 5, EOS], [1, 3, EOS], [4, EOS], [4, 4, 4, EOS], [6, 7, 8, EOS], [1, 3, EOS]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_qwen2(VOCAB).double()


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> RolloutEngine:
    rows = TokenRows.from_lists(PATHS)
    names = [str(item) for item in range(len(PATHS))]
    return RolloutEngine(HfLM(model), Catalog(names, names, "title", rows, TokenTrie.from_paths(rows)),
                         RolloutConfig(), seed=5)  # fmt: skip


@pytest.fixture(scope="module")
def batch() -> PromptBatch:
    rng = np.random.default_rng(1)
    prompts = TokenRows.from_lists([rng.integers(1, VOCAB, rng.integers(1, 9)).tolist() for _ in range(24)])
    return PromptBatch(torch.arange(100, 124), prompts, torch.from_numpy(rng.integers(0, len(PATHS), 24)))


def drawn(leaves: list[int], scores: dict[int, float]) -> Candidates:
    """One prompt's draws as a search returns them: best score first."""
    ordered = sorted(leaves, key=lambda leaf: -scores[leaf])
    leaf_BW = torch.tensor([ordered])
    scores_BW = torch.tensor([[scores[leaf] for leaf in ordered]])
    tokens_BWT = torch.stack([leaf_BW, leaf_BW + 100], dim=-1)
    return Candidates(leaf_BW + 1000, leaf_BW, tokens_BWT, torch.full_like(leaf_BW, 2), scores_BW, tokens_BWT.double())


def expected_leaves(leaves: list[int], scores: dict[int, float], target: int, group_size: int) -> list[int]:
    """The rule, read out loud: rounds over the different paths, the target first, then by score."""
    left = Counter(leaves)
    order = sorted(left, key=lambda leaf: (leaf != target, -scores[leaf]))
    kept: list[int] = []
    while len(kept) < group_size:
        for leaf in order:
            if left[leaf] and len(kept) < group_size:
                left[leaf] -= 1
                kept.append(leaf)
    return sorted(kept, key=lambda leaf: -scores[leaf])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(0, 11), st.data())
def test_the_rule_against_a_loop(leaves: list[int], target: int, data: st.DataObject) -> None:
    group_size = data.draw(st.integers(1, len(leaves)))
    order = data.draw(st.permutations(range(10)))
    scores = {leaf: -float(place) for place, leaf in enumerate(order)}
    kept = keep_distinct(drawn(leaves, scores), torch.tensor([target]), group_size)
    assert kept.leaf_BW[0].tolist() == expected_leaves(leaves, scores, target, group_size)
    # every column belongs to its leaf
    assert torch.equal(kept.items_BW, kept.leaf_BW + 1000)
    assert kept.scores_BW[0].tolist() == [scores[leaf] for leaf in kept.leaf_BW[0].tolist()]
    assert torch.equal(kept.tokens_BWT[..., 1], kept.leaf_BW + 100)
    assert torch.equal(kept.logprobs_BWT, kept.tokens_BWT.double())
    assert (kept.lengths_BW == 2).all()


def test_by_hand() -> None:
    scores = {7: -1.0, 3: -2.0, 5: -3.0, 9: -4.0}
    found = drawn([7, 7, 7, 3, 3, 5, 9], scores)

    def kept(target: int, group_size: int) -> list[int]:
        return keep_distinct(found, torch.tensor([target]), group_size).leaf_BW[0].tolist()

    assert kept(1, 3) == [7, 3, 5]  # the target was not drawn: the best three paths
    assert kept(9, 3) == [7, 3, 9]  # it was: it takes the place of the worst of them
    assert kept(9, 5) == [7, 7, 3, 5, 9]  # more places than paths: a second draw of the best
    assert kept(3, 5) == [7, 3, 3, 5, 9]  # ... or of the target, which comes first
    assert kept(9, 7) == [7, 7, 7, 3, 3, 5, 9]


def test_equal_scores_of_different_paths_do_not_confuse() -> None:
    scores = {7: -1.0, 3: -1.0}
    found = drawn([7, 3, 7, 3], scores)
    assert sorted(keep_distinct(found, torch.tensor([0]), 2).leaf_BW[0].tolist()) == [3, 7]


@pytest.mark.parametrize(("group_size", "oversample"), [(3, 2.0), (4, 1.5), (9, 1.0), (5, 4.0)])
def test_groups_of_the_engine(
    engine: RolloutEngine, model: PreTrainedModel, batch: PromptBatch, group_size: int, oversample: float
) -> None:
    rollout = engine.generate(
        batch, group_size, negatives="dynamic", policy_space="trie", step=3, oversample=oversample
    )
    draws = draws_for(group_size, oversample)
    seeds = [draw_seed(engine.seed, 3, int(row)) for row in batch.row_B]
    sampled = engine.sample(batch.prompts, draws, seeds)
    trie = engine.catalog.trie
    assert rollout.items_BG.shape == (24, group_size)
    assert rollout.valid_BG.all()
    assert rollout.logprobs_BGT is not None
    outcomes = Counter()
    for row in range(24):
        items = rollout.items_BG[row].tolist()
        drawn_leaves = Counter(sampled.leaf_BW[row].tolist())
        leaves = Counter(trie.leaf_I[items].tolist())
        assert not leaves - drawn_leaves  # every candidate is a draw
        distinct = min(group_size, len(drawn_leaves))
        assert len(leaves) == distinct
        target_leaf = int(trie.leaf_I[int(batch.target_B[row])])
        assert (target_leaf in leaves) == (target_leaf in drawn_leaves)
        assert rollout.is_target_BG[row].tolist() == [leaf == target_leaf for leaf in trie.leaf_I[items].tolist()]
        assert (rollout.scores_BG[row].diff() <= 0).all()
        exact = dict(
            zip(leaves_of(trie), exhaustive_logprobs(model, batch.prompts[row].tolist(), trie, "trie"), strict=True)
        )
        for place, item in enumerate(items):
            length = int(rollout.lengths_BG[row, place])
            logprobs = exact[int(trie.leaf_I[item])]
            np.testing.assert_allclose(rollout.logprobs_BGT[row, place, :length], logprobs, rtol=0, atol=TOLERANCE)
            assert not rollout.logprobs_BGT[row, place, length:].any()
            assert float(rollout.scores_BG[row, place]) == pytest.approx(sum(logprobs), abs=TOLERANCE)
            assert rollout.tokens_BGT[row, place, :length].tolist() == PATHS[item]
        outcomes["kept"] += target_leaf in leaves
        outcomes["absent"] += target_leaf not in leaves
        outcomes["dropped"] += len(drawn_leaves) > group_size
        outcomes["filled"] += len(leaves) < group_size
    # the setting shows what it is meant to show
    assert outcomes["kept"] > 0
    assert outcomes["filled" if group_size > 4 else "dropped"] > 0
    if group_size < 5:
        assert outcomes["absent"] > 0


def test_more_distinct_items_than_independent_draws(engine: RolloutEngine, batch: PromptBatch) -> None:
    def distinct(**options: object) -> int:
        rollout = engine.generate(batch, 4, policy_space="trie", step=0, **options)  # type: ignore[arg-type]
        return sum(len(set(row)) for row in rollout.items_BG.tolist())

    plain = distinct(negatives="sample")
    assert plain < distinct(negatives="dynamic") <= distinct(negatives="dynamic", oversample=8.0) <= 4 * 24
    assert distinct(negatives="dynamic", oversample=1.0) == plain  # nothing to choose from: the same draws


def test_groups_are_a_function_of_seed_step_and_row(engine: RolloutEngine, batch: PromptBatch) -> None:
    def group(engine: RolloutEngine, rows: np.ndarray, step: int) -> list[list[int]]:
        part = PromptBatch(batch.row_B[rows], batch.prompts.take(rows), batch.target_B[rows])
        return engine.generate(part, 4, negatives="dynamic", policy_space="trie", step=step).items_BG.tolist()

    def changed(seed: int = 5, **changes: object) -> RolloutEngine:
        return RolloutEngine(engine.lm, engine.catalog, replace(engine.cfg, **changes), seed=seed)

    everything = group(engine, np.arange(24), 3)
    assert group(changed(token_budget=16), np.arange(24), 3) == everything
    assert group(engine, np.array([7, 2]), 3) == [everything[7], everything[2]]
    assert group(engine, np.arange(24), 4) != everything
    assert group(changed(seed=6), np.arange(24), 3) != everything


def test_logprobs_are_left_out_in_vocab_space_and_no_prompts_are_no_groups(
    engine: RolloutEngine, batch: PromptBatch
) -> None:
    assert engine.generate(batch, 3, negatives="dynamic", policy_space="vocab", step=0).logprobs_BGT is None
    none = PromptBatch(torch.zeros(0, dtype=torch.long), TokenRows.from_lists([]), torch.zeros(0, dtype=torch.long))
    assert engine.generate(none, 3, negatives="dynamic", policy_space="trie", step=0).items_BG.shape == (0, 3)


def test_draws_are_rounded_up_and_never_too_few(engine: RolloutEngine, batch: PromptBatch) -> None:
    assert [draws_for(16, 1.5), draws_for(3, 1.5), draws_for(10, 1.1), draws_for(7, 1.0)] == [24, 5, 11, 7]
    for oversample in (0.99, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"rl\.oversample="):
            engine.generate(batch, 3, negatives="dynamic", policy_space="trie", step=0, oversample=oversample)
