"""Packed preference rows on a real nano model against one forward pass per answer and loops over the equations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tawin_nemo.config.schema import ModelConfig, PreferenceConfig, TrainerConfig
from tawin_nemo.data.batches import BatchStream
from tawin_nemo.data.negative_sampling import RandomNegatives
from tawin_nemo.data.samples import Samples
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.train.preference_batch import StepTerms, margins, pack_rows, preference_loss, preference_stats
from tawin_nemo.train.preference_negatives import DrawnNegatives
from tawin_nemo.train.preference_rows import RowBuilder
from tawin_nemo.types import NO_ITEM, DataParallel, TokenRows
from tests.train.actor_scene import SHAPE, catalog

ROWS, NUM = 11, 3
#: Log-probs of a packed tree against a plain forward pass, float32, summed over a few tokens.
ATOL = 2e-5
BASE = PreferenceConfig(enabled=True, beta=0.7, num_negatives=NUM, global_batch_size=ROWS, micro_batch_tokens=64)
CONFIGS = {
    "dpo": replace(BASE, algorithm="dpo"),
    "sdpo": replace(BASE, algorithm="sdpo"),
    "sdpo in vocabulary space": replace(BASE, algorithm="sdpo", policy_space="vocab"),
    "rosepo": replace(BASE, algorithm="rosepo", epsilon=0.2),
    "simpo": replace(BASE, algorithm="simpo"),
    "simpo by branching tokens": replace(BASE, algorithm="simpo", length_norm="branching"),
    "napo": replace(BASE, algorithm="napo", share_group=4, margin="fixed"),
    "napo without length norm": replace(BASE, algorithm="napo", share_group=4, margin="fixed", length_norm="off"),
    "alpha_dpo": replace(BASE, algorithm="alpha_dpo"),
}


class StatesByHistory:
    """An auxiliary model whose states are a fixed function of the history."""

    def states(self, histories):
        return torch.stack([torch.tensor([math.sin(h.sum()), math.cos(h.sum()), len(h)]) for h in histories])

    def cosines(self, state_BD, items_BN):
        return torch.cos(state_BD[:, :1] + items_BN)


class Scene:
    """A policy, a reference with other weights, and the rows of one step, one of which lacks a rejected item."""

    def __init__(self, cfg, dp=None):
        runtime.initialize(ModelConfig(), seed=0)
        self.cfg, self.catalog = cfg, catalog()
        self.trainable = Trainable(build_model(SHAPE, ModelConfig(), seed=3), SHAPE, TrainerConfig(), lr=1e-3)
        self.reference = Trainable(build_model(SHAPE, ModelConfig(), seed=4), SHAPE, TrainerConfig(), lr=1e-3)
        draw = np.random.default_rng(6)
        items = len(self.catalog)
        self.samples = Samples(
            TokenRows.from_lists([draw.integers(2, 40, size=draw.integers(3, 9)) for _ in range(ROWS)]),
            draw.integers(0, items, size=ROWS),
            np.arange(ROWS),
            TokenRows.from_lists([draw.integers(0, items, size=draw.integers(1, 12)) for _ in range(ROWS)]),
        )
        negatives = RandomNegatives(self.samples, self.catalog.leaf_I, NUM, seed=5)
        stream = BatchStream(ROWS, ROWS, seed=2)
        self.builder = RowBuilder(cfg, self.samples, np.arange(ROWS), stream, dp or DataParallel(), StatesByHistory())
        self.rows = self.builder.of_step(0, DrawnNegatives(negatives))
        if dp is None:
            self.rows.items_RN[2, 1] = NO_ITEM
        self.terms = StepTerms(ROWS, gamma=0.8, margin_mean=0.1, margin_std=0.4)

    def packed(self):
        return pack_rows(self.rows, self.samples, self.catalog, self.cfg)

    def work(self, packed, terms=None):
        uses = self.cfg.uses_reference
        ref = self.reference.score([part.batch for part in packed]) if uses else [None] * len(packed)
        return [
            MicroBatch(
                part.batch,
                lambda logp_N, part=part, other=other: preference_loss(
                    logp_N, part, self.cfg, terms or self.terms, other
                ),
            )
            for part, other in zip(packed, ref, strict=True)
        ]

    def log_prob(self, trainable, place, item):
        """Summed log-prob of an item after a prompt by a pass of its own, and what it is divided by."""
        trie = self.catalog.trie if self.cfg.policy_space == "trie" else None
        path = self.catalog.paths.take(np.array([item]))
        batch, index = tree_batch(
            self.samples.prompts.take(self.rows.row_R[[place]]), path, np.zeros(1, np.int64), trie
        )
        length = {"full": int(path.lengths[0]), "branching": max(1, len(index.answer_N)), "off": 1}
        return float(trainable.score([batch])[0].double().sum()), length[self.cfg.normalised_by]

    def reward(self, place, item, *, hat):
        logp, length = self.log_prob(self.trainable, place, item)
        other = self.log_prob(self.reference, place, item)[0] if hat else 0.0
        return self.cfg.beta * (logp - other) / length


def softplus(x):
    return math.log1p(math.exp(x))


def expected_loss(s):
    """The mean loss over rows, from rewards that were each computed alone."""
    cfg, total, items_RN = s.cfg, 0.0, s.rows.items_RN
    hat = cfg.algorithm in ("dpo", "sdpo", "rosepo")
    rejected = {
        (place, n): s.reward(place, items_RN[place, n], hat=hat)
        for place in range(ROWS)
        for n in range(NUM)
        if items_RN[place, n] != NO_ITEM
    }
    for place in range(ROWS):
        target = s.samples.target_N[s.rows.row_R[place]]
        pos = s.reward(place, target, hat=hat)
        own = [rejected[place, n] for n in range(NUM) if (place, n) in rejected]
        if cfg.algorithm == "dpo":
            total += sum(softplus(neg - pos) for neg in own) / len(own)
        elif cfg.algorithm == "rosepo":
            for n in range(NUM):
                if (place, n) in rejected:
                    d, e = pos - rejected[place, n], float(s.rows.epsilon_RN[place, n])
                    total += ((1 - e) * softplus(-d) + e * softplus(d)) / len(own)
        elif cfg.algorithm == "simpo":
            total += sum(softplus(neg - pos + s.terms.gamma) for neg in own) / len(own)
        elif cfg.algorithm == "sdpo":
            total += softplus(math.log(sum(math.exp(neg - pos) for neg in own)))
        elif cfg.algorithm == "alpha_dpo":
            best = s.reward(place, target, hat=True)
            for n in range(NUM):
                if (place, n) in rejected:
                    margin = best - s.reward(place, items_RN[place, n], hat=True)
                    z = (margin - s.terms.margin_mean) / s.terms.margin_std
                    total += softplus(rejected[place, n] - pos + s.terms.gamma + cfg.alpha * z) / len(own)
        else:
            leaves = s.catalog.leaf_I
            barred = {*leaves[s.samples.history[s.rows.row_R[place]]].tolist(), int(leaves[target])}
            compared = list(own)
            for other in similar_places(s, place):
                for n in range(NUM):
                    if (other, n) in rejected and int(leaves[items_RN[other, n]]) not in barred:
                        compared.append(rejected[other, n])
            total += softplus(math.log(sum(math.exp(neg - pos) for neg in compared)) + s.terms.gamma)
    return total / ROWS


def similar_places(s, place):
    """The floor((b - 1) rho) rows of the same group of 4 in the stream's order with the largest inner products."""
    order = BatchStream(ROWS, ROWS, seed=2).batch(0).tolist()
    assert order == s.rows.row_R.tolist()
    group = [p for p in range(ROWS) if p // 4 == place // 4]
    state = {p: s.builder.aux.states([s.samples.history[order[p]]])[0] for p in group}
    others = sorted((p for p in group if p != place), key=lambda p: (-float(state[p] @ state[place]), p))
    return others[: math.floor((len(group) - 1) * s.cfg.rho + 1e-9)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_every_answer_scored_alone(name):
    scene = Scene(CONFIGS[name])
    packed = scene.packed()
    assert len(packed) > 1
    stats = scene.trainable.accumulate(scene.work(packed))
    assert stats["loss"] == pytest.approx(expected_loss(scene), abs=ATOL)
    found = preference_stats({**stats, "grad_norm": 0.0})
    assert stats["rows"] == ROWS
    assert stats["pairs"] == ROWS * NUM - 1
    if scene.cfg.algorithm == "napo":
        assert found["negatives_per_row"] > 1.5 * NUM
    else:
        assert found["negatives_per_row"] == pytest.approx(NUM - 1 / ROWS)


@pytest.mark.parametrize("name", ["sdpo", "napo", "alpha_dpo", "rosepo"])
def test_loss_and_gradients_do_not_depend_on_the_micro_batches(name):
    """A group of four stays whole, in a budget of one token too."""
    results = []
    for budget in (1, 10_000):
        scene = Scene(replace(CONFIGS[name], micro_batch_tokens=budget))
        packed = scene.packed()
        assert len(packed) == (1 if budget > 1 else len(np.unique(scene.rows.group_R)))
        stats = scene.trainable.accumulate(scene.work(packed))
        gradients = [p.main_grad.clone() for p in scene.trainable.model.parameters()]
        results.append((stats["loss"], gradients))
    (loss, gradients), (other_loss, others) = results
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert max(float(part.abs().max()) for part in gradients) > 1e-3
    for mine, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_replicas_take_whole_groups_and_add_up_to_the_batch():
    cfg = CONFIGS["napo"]
    whole = Scene(cfg)
    total, rows = 0.0, []
    for rank in range(4):  # three groups: one replica has nothing to do
        scene = Scene(cfg, DataParallel(rank, 4))
        rows += scene.rows.row_R.tolist()
        order = whole.rows.row_R.tolist()
        scene.rows.items_RN[...] = whole.rows.items_RN[[order.index(row) for row in scene.rows.row_R]]
        total += scene.trainable.accumulate(scene.work(scene.packed()))["loss"]
    assert sorted(rows) == list(range(ROWS))
    assert total == pytest.approx(whole.trainable.accumulate(whole.work(whole.packed()))["loss"], abs=ATOL)


def test_a_step_raises_the_targets_and_lowers_the_rejected_items():
    scene = Scene(CONFIGS["napo"])
    work = scene.work(scene.packed())
    before = preference_stats(scene.trainable.update(work, lr=1e-2))
    for _ in range(10):
        after = preference_stats(scene.trainable.update(work, lr=1e-2))
    assert after["loss"] < before["loss"] - 0.1
    assert after["reward_margin"] > before["reward_margin"] + 0.1
    assert after["pair_accuracy"] > before["pair_accuracy"]


def test_the_policy_itself_as_reference_gives_margin_zero():
    scene = Scene(CONFIGS["alpha_dpo"])
    for part in scene.packed():
        logp_N = scene.trainable.score([part.batch])[0]
        assert float(margins(logp_N, part, scene.cfg, logp_N).abs().max()) == 0.0
