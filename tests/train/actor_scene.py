"""A nano actor with its engine and one rollout: what the tests of the actor, its terms and its references share."""

import numpy as np
import torch

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, RlConfig, RolloutConfig, TrainerConfig
from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.maths.tawin import tawin_weights
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.groups import ensure_target
from tawin_nemo.train.actor import Actor
from tawin_nemo.types import DataParallel, PromptBatch, Rollout, TokenRows

SHAPE = Backbone("qwen2", 32, 2, 4, 2, 48, 40, rope_theta=1e4, max_position=64, init_std=0.3)
GROUP = 5
#: Log-probs of cached search against a plain forward pass, float32.
LOGP_ATOL = 2e-5
#: Weights after one update whose sums ran in another order; AdamW turns tiny gradient noise into steps of lr.
WEIGHT_ATOL = 5e-5


def catalog() -> Catalog:
    draw = np.random.default_rng(5)
    paths = {tuple(draw.integers(2, 12, size=draw.integers(2, 5)).tolist()) for _ in range(60)}
    rows = TokenRows.from_lists([[*path, 1] for path in sorted(paths)])
    titles = [f"item {i}" for i in range(len(rows))]
    return Catalog(titles, titles, "title", rows, TokenTrie.from_paths(rows))


def prompts(items: int) -> PromptBatch:
    draw = np.random.default_rng(6)
    rows = TokenRows.from_lists([draw.integers(2, 40, size=draw.integers(3, 9)) for _ in range(6)])
    return PromptBatch(torch.arange(6), rows, torch.from_numpy(draw.integers(0, items, size=6)))


class Scene:
    """A trainable model, its engine, a rollout in which every group has its target, and the weights of its members."""

    def __init__(self, rl: RlConfig, *, targets: bool = True) -> None:
        runtime.initialize(ModelConfig(), seed=0)
        self.catalog = catalog()
        self.trainable = Trainable(build_model(SHAPE, ModelConfig(), seed=3), SHAPE, TrainerConfig(), lr=1e-3)
        self.engine = RolloutEngine(MegatronLM(self.trainable.model, SHAPE), self.catalog, RolloutConfig(), seed=0)
        self.actor = Actor(self.trainable, self.catalog, rl, DataParallel())
        batch = prompts(len(self.catalog))
        self.rollout: Rollout = self.engine.generate(
            batch, GROUP, negatives=rl.negatives, policy_space=rl.policy_space, step=0
        )
        if targets:
            self.rollout = ensure_target(self.rollout, self.catalog)
        self.adv_BG = group_advantages(self.rollout.is_target_BG.float())
        self.adv_BG[:2] = 0.0  # as in groups whose candidates all have the same reward
        self.omega_BG = tawin_weights(self.rollout.scores_BG, self.rollout.is_target_BG, k=1.0, tau=0.01, anchor=0.0)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.trainable.model.named_parameters()}

    def update(self, rl: RlConfig, *, keep_all: bool = False) -> dict[str, torch.Tensor]:
        actor = Actor(self.trainable, self.catalog, rl, DataParallel())
        ones = torch.ones_like(self.adv_BG)
        packed = actor.pack(self.rollout, *((ones, ones) if keep_all else (self.adv_BG, self.omega_BG)))
        actor.update(self.rollout, packed, self.adv_BG, self.omega_BG, None, lr=1e-3)
        return self.weights()


PLAIN = RlConfig(beta=0.0)
