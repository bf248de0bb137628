"""The engine: chunks change nothing, hits share the target's path, draws are a function of (seed, step, row)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hf_lm import HfLM, random_qwen2

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.rollout.beam import BeamSearch
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.types import PromptBatch, TokenRows
from tawin_nemo.util.errors import ConfigError, DataError

VOCAB, EOS, ITEMS = 40, 0, 30
TOLERANCE = 1e-10  # float64: padding changes only the order of summation


@pytest.fixture(scope="module")
def engine() -> RolloutEngine:
    rng = np.random.default_rng(0)
    paths = [[*rng.integers(1, 6, rng.integers(1, 5)).tolist(), EOS] for _ in range(ITEMS)]
    rows = TokenRows.from_lists(paths)
    names = [str(item) for item in range(ITEMS)]
    catalog = Catalog(names, names, "title", rows, TokenTrie.from_paths(rows))
    return RolloutEngine(HfLM(random_qwen2(VOCAB).double()), catalog, RolloutConfig(), seed=5)


@pytest.fixture(scope="module")
def batch() -> PromptBatch:
    rng = np.random.default_rng(1)
    prompts = TokenRows.from_lists([rng.integers(1, VOCAB, rng.integers(1, 20)).tolist() for _ in range(11)])
    return PromptBatch(torch.arange(100, 111), prompts, torch.from_numpy(rng.integers(0, ITEMS, 11)))


def configured(engine: RolloutEngine, **changes: object) -> RolloutEngine:
    return RolloutEngine(engine.lm, engine.catalog, replace(engine.cfg, **changes), seed=engine.seed)


@pytest.mark.parametrize("space", ["trie", "vocab"])
@pytest.mark.parametrize("token_budget", [16, 300])
def test_chunks_change_nothing(engine: RolloutEngine, batch: PromptBatch, space: str, token_budget: int) -> None:
    seen: list[int] = []
    whole = engine.search(batch.prompts, 7, score_space=space)
    parts = engine.search(batch.prompts, 7, score_space=space, token_budget=token_budget, progress=seen.append)
    assert sum(seen) == len(batch)
    assert len(seen) > 1
    for name in ("items_BW", "leaf_BW", "tokens_BWT", "lengths_BW"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    for name in ("scores_BW", "logprobs_BWT"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("space", ["trie", "vocab"])
def test_a_running_search_stays_within_the_budget(
    engine: RolloutEngine, batch: PromptBatch, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets of some prompts: what the cache may come to never exceeds them, and prompts join while others run."""
    held: list[int] = []
    joined: list[int] = []
    admit = BeamSearch.admit

    def watched(search: BeamSearch, prompts: TokenRows, tickets: np.ndarray, **options: Any) -> None:
        joined.append(search.running)
        admit(search, prompts, tickets, **options)
        held.append(search.cache_tokens)

    monkeypatch.setattr(BeamSearch, "admit", watched)
    one = BeamSearch(engine.lm, engine.catalog.trie, 4, score_space=space)
    largest = int(one.max_cache_tokens(batch.prompts.lengths).max())
    for budget in (largest, 3 * largest, 4 * largest):
        held.clear()
        engine.search(batch.prompts, 4, score_space=space, token_budget=budget)
        assert max(held) <= budget
    assert any(running > 0 for running in joined)
    held.clear()
    engine.search(batch.prompts, 4, score_space=space, token_budget=1)  # too small for any: one after the other
    assert max(held) == largest
    assert len(held) == len(batch)


def test_results_come_as_soon_as_they_are_there(engine: RolloutEngine, batch: PromptBatch) -> None:
    whole, seen = engine.search(batch.prompts, 5), []
    for part in engine.stream(batch.prompts, 5, token_budget=200):
        seen += part.ticket_B.tolist()
        assert torch.equal(part.candidates.leaf_BW, whole.leaf_BW[torch.from_numpy(part.ticket_B)])
    assert sorted(seen) == list(range(len(batch)))


def test_a_candidate_on_the_target_s_path_is_a_hit(engine: RolloutEngine, batch: PromptBatch) -> None:
    assert engine.catalog.duplicates()
    twin = engine.catalog.duplicates()[0][1]
    targets = torch.full((len(batch),), twin)
    paths = engine.catalog.trie.num_leaves
    rollout = engine.generate(replace(batch, target_B=targets), paths, negatives="beam", policy_space="trie", step=0)
    assert (rollout.items_BG != twin).all()  # the path is reported as its first item
    assert (rollout.is_target_BG.sum(dim=1) == 1).all()
    assert (rollout.items_BG[rollout.is_target_BG] == engine.catalog.duplicates()[0][0]).all()
    assert rollout.valid_BG.all()


def test_wider_search_keeps_the_best(engine: RolloutEngine, batch: PromptBatch) -> None:
    wide = configured(engine, width=12).generate(batch, 4, negatives="beam", policy_space="trie", step=0)
    found = engine.search(batch.prompts, 12)
    assert torch.equal(wide.items_BG, found.items_BW[:, :4])
    assert wide.logprobs_BGT is not None
    torch.testing.assert_close(wide.logprobs_BGT.sum(-1), wide.scores_BG, rtol=0, atol=TOLERANCE)


def test_logprobs_are_left_out_when_another_space_was_searched(engine: RolloutEngine, batch: PromptBatch) -> None:
    for space, policy, known in [("trie", "trie", True), ("trie", "vocab", False), ("vocab", "vocab", True)]:
        searcher = configured(engine, score_space=space)
        rollout = searcher.generate(batch, 4, negatives="beam", policy_space=policy, step=0)
        assert (rollout.logprobs_BGT is not None) == known
    sampled = configured(engine, score_space="vocab").generate(
        batch, 4, negatives="sample", policy_space="trie", step=0
    )
    assert sampled.logprobs_BGT is not None  # draws are always made in trie space


def test_draws_are_a_function_of_seed_step_and_row(engine: RolloutEngine, batch: PromptBatch) -> None:
    def draw(engine: RolloutEngine, rows: np.ndarray, step: int) -> list[list[int]]:
        part = PromptBatch(batch.row_B[rows], batch.prompts.take(rows), batch.target_B[rows])
        return engine.generate(part, 6, negatives="sample", policy_space="trie", step=step).items_BG.tolist()

    everything = draw(engine, np.arange(11), 3)
    assert draw(configured(engine, token_budget=16), np.arange(11), 3) == everything
    assert draw(engine, np.array([7, 2]), 3) == [everything[7], everything[2]]
    assert draw(engine, np.arange(11), 4) != everything
    reseeded = RolloutEngine(engine.lm, engine.catalog, engine.cfg, seed=6)
    assert draw(reseeded, np.arange(11), 3) != everything


def test_rollouts_carry_the_weight_version(engine: RolloutEngine, batch: PromptBatch) -> None:
    moved = configured(engine)
    assert moved.generate(batch, 2, negatives="beam", policy_space="trie", step=0).weight_version == 0
    moved.weight_version = 8
    assert moved.generate(batch, 2, negatives="beam", policy_space="trie", step=0).weight_version == 8


def test_no_prompts_give_an_empty_rollout(engine: RolloutEngine) -> None:
    none = PromptBatch(torch.zeros(0, dtype=torch.long), TokenRows.from_lists([]), torch.zeros(0, dtype=torch.long))
    for negatives in ("beam", "sample"):
        rollout = engine.generate(none, 4, negatives=negatives, policy_space="trie", step=0)
        assert rollout.items_BG.shape == (0, 4)


def test_unusable_arguments_are_refused(engine: RolloutEngine, batch: PromptBatch) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.width=3"):
        configured(engine, width=3).generate(batch, 4, negatives="beam", policy_space="trie", step=0)
    with pytest.raises(ConfigError, match="uniform"):
        engine.generate(batch, 4, negatives="uniform", policy_space="trie", step=0)
    with pytest.raises(ConfigError, match="joint"):
        engine.generate(batch, 4, negatives="beam", policy_space="joint", step=0)
    with pytest.raises(ConfigError, match="0"):
        engine.search(batch.prompts, 0)
    paths = engine.catalog.trie.num_leaves
    for wide, key in ((0, f"rl.group_size={paths + 1}"), (paths + 5, rf"rollout\.width={paths + 5}")):
        with pytest.raises(ConfigError, match=rf"{key} .*\({paths}\)"):
            configured(engine, width=wide).generate(batch, paths + 1, negatives="beam", policy_space="trie", step=0)
    with pytest.raises(ConfigError, match=rf"eval\.beams\)={paths + 1} .*\({paths}\)"):
        engine.search(batch.prompts, paths + 1)
    drawn = engine.generate(batch, paths + 1, negatives="sample", policy_space="trie", step=0)
    assert drawn.valid_BG.all()  # with replacement
    lists = [row.tolist() for row in (batch.prompts[i] for i in range(len(batch)))]
    lists[6] = [1] * (engine.lm.max_positions - 1)
    with pytest.raises(DataError, match="prompt row 6 has 2047 tokens"):
        engine.search(TokenRows.from_lists(lists), 2, token_budget=50)
    lists[6] = [1, VOCAB]
    with pytest.raises(DataError, match=f"prompt row 6 has token {VOCAB}"):
        engine.sample(TokenRows.from_lists(lists), 2, seeds=[0] * len(lists))
    bad = replace(batch, target_B=torch.full((11,), ITEMS))
    with pytest.raises(DataError, match=str(ITEMS)):
        engine.generate(bad, 4, negatives="beam", policy_space="trie", step=0)
