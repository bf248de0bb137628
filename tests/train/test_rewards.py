"""From a recipe's reward to rewards_BG: each against the formula of maths, with its files, histories and errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tawin_nemo.baselines.build import Blueprint, build_recommender
from tawin_nemo.baselines.load import DONE_FILE, MODEL_FILE, ModelAndOptimizer, save_checkpoint
from tawin_nemo.config.schema import BaselineConfig, RlConfig
from tawin_nemo.data.samples import Samples
from tawin_nemo.data.text_vectors import text_vectors
from tawin_nemo.maths.rewards import collaborative_reward, ranking_reward, rule_reward, semantic_reward
from tawin_nemo.train.rewards import CollaborativeReward, RankingReward, RuleReward, SemanticReward, build_reward
from tawin_nemo.types import NO_ITEM, PromptBatch, Rollout, TokenRows
from tawin_nemo.util.errors import ConfigError, DataError

TITLES = ["steel bolt", "steel nut", "brass bolt", "nitrile glove", "latex glove"]
HISTORIES = TokenRows.from_lists([[0], [1, 2], [3, 4, 0], [2], [4, 1]])


def world(titles: list[str] = TITLES) -> Any:
    """What build_reward looks at."""
    rows = len(HISTORIES)
    samples = Samples(TokenRows.from_lists([[7]] * rows), np.zeros(rows, np.int64), np.zeros(rows, np.int64), HISTORIES)
    return SimpleNamespace(
        catalog=SimpleNamespace(external_ids=titles), samples={"train": samples}, recipe=SimpleNamespace(seed=3),
        dataset=SimpleNamespace(items=SimpleNamespace(titles=titles)),
    )  # fmt: skip


def rollout(rows: list[int]) -> Rollout:
    """Groups for rows of train, some with padding."""
    rng = np.random.default_rng(0)
    items_BG = torch.from_numpy(np.stack([rng.permutation(5)[:4] for _ in rows]))
    items_BG[1:2, 3] = NO_ITEM
    target_B = torch.tensor([int(items_BG[i, i % 3]) for i in range(len(rows))])
    hits_BG = items_BG == target_B[:, None]
    hits_BG[0] = False  # a group without its target
    prompts = PromptBatch(torch.tensor(rows), TokenRows.from_lists([[7]] * len(rows)), target_B)
    scores_BG = (-torch.arange(4.0)).repeat(len(rows), 1).masked_fill(items_BG == NO_ITEM, -torch.inf)
    lengths_BG = (items_BG != NO_ITEM).long()
    return Rollout(prompts, items_BG, items_BG[..., None].clamp(min=0), lengths_BG, scores_BG, None, hits_BG, 0)


def test_rule_and_ranking() -> None:
    found = rollout([2, 0, 4])
    rule, ranking = build_reward(RlConfig(reward="rule"), world()), build_reward(RlConfig(reward="ranking"), world())
    assert isinstance(rule, RuleReward)
    assert isinstance(ranking, RankingReward)
    expected = rule_reward(found.items_BG, found.prompts.target_B)
    expected[0] = 0
    assert torch.equal(rule(found), expected)
    assert torch.equal(
        ranking(found), ranking_reward(found.scores_BG, found.is_target_BG, valid_BG=found.items_BG != NO_ITEM)
    )


def test_semantic_reward_of_a_file(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    np.save(tmp_path / "items.npy", vectors)
    rl = RlConfig(reward="semantic", reward_source=str(tmp_path / "items.npy"), reward_weight=0.4)
    found = rollout([2, 0, 4])
    rewards_BG = build_reward(rl, world())(found)
    expected = semantic_reward(
        found.items_BG, found.prompts.target_B, torch.from_numpy(vectors), is_target_BG=found.is_target_BG, weight=0.4
    )
    assert torch.equal(rewards_BG, expected)
    assert rewards_BG[1, 3] == 0
    with pytest.raises(DataError, match=r"rl\.reward_source=.*5 rows and the catalog 2 items"):
        build_reward(rl, world(TITLES[:2]))
    with pytest.raises(DataError, match=r"rl\.reward_source=.*no such file"):
        build_reward(replace(rl, reward_source=str(tmp_path / "absent.npy")), world())


def test_semantic_reward_of_the_titles() -> None:
    reward = build_reward(RlConfig(reward="semantic"), world())
    assert isinstance(reward, SemanticReward)
    assert torch.equal(reward.vectors_ID, torch.from_numpy(text_vectors(TITLES, seed=3)))
    assert reward.weight == 1.0
    groups = replace(
        rollout([0]), items_BG=torch.tensor([[1, 2, 3, 4]]), is_target_BG=torch.zeros((1, 4), dtype=torch.bool),
        prompts=PromptBatch(torch.tensor([0]), TokenRows.from_lists([[7]]), torch.tensor([0])),
    )  # fmt: skip
    (rewards_G,) = reward(groups)
    assert rewards_G[:2].min() > 0.3  # a shared word
    assert rewards_G[2:].abs().max() < 1e-5


class Remembering:
    """Scores that name the items of the history, so that a wrong history would show."""

    def scores(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        scores_BI = torch.zeros((len(histories), 5), dtype=torch.float64)
        for row, history in enumerate(histories):
            for place, item in enumerate(history.tolist()):
                scores_BI[row, item] += 1 + place
        return scores_BI


def test_collaborative_reward_reads_the_histories_of_its_rows() -> None:
    found = rollout([2, 0, 4])
    rewards_BG = CollaborativeReward(Remembering(), HISTORIES, weight=0.5)(found)
    scores_BI = torch.tensor([[3.0, 0, 0, 1, 2], [1, 0, 0, 0, 0], [0, 2, 0, 0, 1]])
    expected = collaborative_reward(scores_BI, found.items_BG, found.is_target_BG, weight=0.5)
    assert rewards_BG.dtype == torch.float32
    torch.testing.assert_close(rewards_BG, expected)
    other = CollaborativeReward(Remembering(), HISTORIES, weight=0.5)(rollout([0, 2, 4]))
    assert not torch.allclose(other[0], rewards_BG[0])


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished baseline stage with fresh weights."""
    torch.manual_seed(0)
    blueprint = Blueprint(BaselineConfig(model="sasrec", hidden=8, layers=1, heads=1), 5, 10)
    model = build_recommender(blueprint)
    torch.nn.init.normal_(model.items.weight[1:])  # scores that differ
    folder = tmp_path / "sasrec"
    save_checkpoint(
        folder / "checkpoints" / "step_4", ModelAndOptimizer(model, torch.optim.Adam(model.parameters())), {"step": 4}
    )
    (folder / MODEL_FILE).write_text(json.dumps(blueprint.to_json()))
    (folder / DONE_FILE).write_text(json.dumps({"step": 4, "chosen_step": 4}))
    return folder


def test_collaborative_reward_of_a_finished_stage(stage: Path) -> None:
    rl = RlConfig(reward="collaborative", reward_source=str(stage), reward_weight=0.5)
    reward, found = build_reward(rl, world()), rollout([2, 0, 4])
    assert isinstance(reward, CollaborativeReward)
    rewards_BG = reward(found)
    scores_BI = reward.scorer.scores([HISTORIES[row] for row in (2, 0, 4)])
    expected = collaborative_reward(scores_BI, found.items_BG, found.is_target_BG, weight=0.5)
    torch.testing.assert_close(rewards_BG, expected)
    assert not rewards_BG.requires_grad
    misses_B = (rewards_BG * ~found.is_target_BG).sum(1)
    assert len(set(misses_B.tolist())) > 1  # the scores do matter


def test_unusable_sources_are_refused(stage: Path, tmp_path: Path) -> None:
    rl = RlConfig(reward="collaborative", reward_source=str(stage))
    with pytest.raises(ConfigError, match=r"rl\.reward_source"):
        build_reward(replace(rl, reward_source=""), world())
    with pytest.raises(ConfigError, match=r"rl\.reward_source=.*has 2"):
        build_reward(rl, world(TITLES[:2]))
    with pytest.raises(ConfigError, match="not a finished baseline"):
        build_reward(replace(rl, reward_source=str(tmp_path)), world())
    with pytest.raises(ConfigError, match=r"rl\.reward='sasrec'"):
        build_reward(replace(rl, reward="sasrec"), world())
