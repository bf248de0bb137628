"""Actor on a real nano model: what is left out changes nothing, what is stored equals what is scored."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tawin_nemo.config.schema import ModelConfig, RlConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.placement.weight_sync import check_version, sync_weights
from tawin_nemo.train.actor import PackedCandidates
from tawin_nemo.train.reference import CopiedReference
from tawin_nemo.types import DataParallel, TokenRows
from tawin_nemo.util.errors import TawinError
from tests.train.actor_scene import GROUP, LOGP_ATOL, PLAIN, SHAPE, WEIGHT_ATOL, Scene


@pytest.mark.parametrize("space", ["trie", "vocab"])
def test_stored_behaviour_logprobs_equal_the_actors_own(space):
    scene = Scene(replace(PLAIN, policy_space=space), targets=False)
    if space == "vocab":
        assert scene.rollout.logprobs_BGT is None
        return
    ones = torch.ones_like(scene.adv_BG)
    packed = scene.actor.pack(scene.rollout, ones, ones)
    stored = scene.actor.behaviour_logprobs(scene.rollout, packed)
    scored = scene.trainable.score([part.batch for part in packed])
    assert torch.cat(stored).abs().sum() > 0
    torch.testing.assert_close(torch.cat(stored), torch.cat(scored), atol=LOGP_ATOL, rtol=0)


def test_candidates_without_weight_are_left_out_and_nothing_changes():
    lean, full = Scene(PLAIN), Scene(PLAIN)
    ones = torch.ones_like(full.adv_BG)
    sizes = [
        sum(len(part.flat_M) for part in scene.actor.pack(scene.rollout, *weights))
        for scene, weights in ((lean, (lean.adv_BG, lean.omega_BG)), (full, (ones, ones)))
    ]
    assert sizes[0] < sizes[1] == full.rollout.items_BG.numel()
    before, after, expected = lean.weights(), lean.update(PLAIN), full.update(PLAIN, keep_all=True)
    assert max(float((after[name] - before[name]).abs().max()) for name in after) > 5e-4
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, atol=WEIGHT_ATOL, rtol=0, msg=name)


def tokens_packed(scene: Scene, adv_BG: torch.Tensor) -> int:
    ones = torch.ones_like(scene.omega_BG)
    return sum(len(part.batch.tokens_S) for part in scene.actor.pack(scene.rollout, adv_BG, ones))


def test_a_group_without_advantage_costs_no_token_of_reference_scoring_and_update():
    """They all run on the packed batches; with a KL term a group is packed unless rl.kl_groups leaves it out."""
    plain, penalised = Scene(PLAIN), Scene(replace(PLAIN, beta=0.1))
    ones = torch.ones_like(plain.adv_BG)
    alone = [torch.where(torch.arange(len(ones))[:, None] == b, ones, 0.0) for b in range(len(ones))]
    by_group = [tokens_packed(plain, adv_BG) for adv_BG in alone]
    assert min(by_group) > int(plain.rollout.prompts.prompts.lengths.min())
    assert tokens_packed(plain, ones) == sum(by_group)  # one row of all groups behind each other, no padding
    assert tokens_packed(plain, ones - alone[0] - alone[3]) == sum(by_group) - by_group[0] - by_group[3]
    assert tokens_packed(penalised, ones - alone[0] - alone[3]) == sum(by_group)


def adam_state(scene: Scene) -> list[torch.Tensor]:
    (part,) = scene.trainable.optimizer.chained_optimizers
    states = [part.optimizer.state[parameter] for group in part.param_groups for parameter in group["params"]]
    return [tensor for state in states for _, tensor in sorted(state.items())]


@pytest.mark.parametrize("inner_updates", [1, 2])
def test_a_step_without_any_advantage_costs_no_forward_pass_and_changes_nothing_else(monkeypatch, inner_updates):
    """Weights and moments move as after the backward pass of a loss of 0, bit for bit: AdamW has momentum."""
    rl = replace(PLAIN, inner_updates=inner_updates)
    lean, full = Scene(rl), Scene(rl)
    zeros, ones = torch.zeros_like(full.adv_BG), torch.ones_like(full.adv_BG)
    for scene in (lean, full):
        scene.update(rl)  # so that there is momentum
    before = lean.weights()
    packed = full.actor.pack(full.rollout, ones, ones)
    expected = full.actor.update(full.rollout, packed, zeros, ones, None, lr=1e-3)
    assert lean.actor.pack(lean.rollout, zeros, ones) == []
    monkeypatch.setattr(lean.trainable, "accumulate", None)
    stats = lean.actor.update(lean.rollout, [], zeros, ones, None, lr=1e-3)
    assert {name: expected[name] for name in stats} | {"scored_tokens": 0.0} == stats
    assert stats == {"policy_loss": 0.0, "loss": 0.0, "scored_tokens": 0.0, "grad_norm": 0.0}
    for name, value in full.weights().items():
        assert torch.equal(lean.weights()[name], value), name
        assert not torch.equal(value, before[name]), name
    for ours, theirs in zip(adam_state(lean), adam_state(full), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("term", [{"beta": 0.1}, {"sft_weight": 0.5}])
def test_a_step_with_another_term_is_never_empty(term):
    scene = Scene(replace(PLAIN, **term))
    zeros, ones = torch.zeros_like(scene.adv_BG), torch.ones_like(scene.adv_BG)
    assert len({int(flat) for part in scene.actor.pack(scene.rollout, zeros, ones) for flat in part.flat_M}) >= 6


def test_the_token_budget_changes_nothing():
    small = replace(PLAIN, micro_batch_tokens=16)
    one, many = Scene(PLAIN), Scene(small)
    assert len(many.actor.pack(many.rollout, many.adv_BG, many.omega_BG)) > 3
    after, expected = many.update(small), one.update(PLAIN)
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, atol=WEIGHT_ATOL, rtol=0, msg=name)


@pytest.mark.parametrize(
    "rl",
    [
        PLAIN,
        replace(PLAIN, policy_space="vocab", inner_updates=2),
        RlConfig(beta=0.3, negatives="sample", length_norm="branching"),
    ],
    ids=["trie", "vocab", "kl-of-draws-with-duplicates"],
)
def test_a_tree_learns_what_candidates_behind_their_own_prompts_teach(rl):
    tree, repeated = Scene(rl), Scene(rl)
    packed = tree.actor.pack(tree.rollout, tree.adv_BG, tree.omega_BG)
    chains = [behind_own_prompts(repeated, rl, part) for part in packed]
    assert sum(len(part.batch.tokens_S) for part in packed) < 0.7 * sum(len(part.batch.tokens_S) for part in chains)
    stats, weights = [], []
    for scene, parts in ((tree, packed), (repeated, chains)):
        reference = build_model(SHAPE, ModelConfig(), seed=4)
        ref = CopiedReference(reference).logprobs([part.batch for part in parts]) if rl.beta > 0 else None
        stats.append(scene.actor.update(scene.rollout, parts, scene.adv_BG, scene.omega_BG, ref, lr=1e-3))
        weights.append(scene.weights())
    assert stats[0] == pytest.approx(stats[1], rel=1e-4, abs=1e-6)
    assert stats[0]["grad_norm"] > 1e-3
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, atol=WEIGHT_ATOL, rtol=0, msg=name)


def behind_own_prompts(scene: Scene, rl: RlConfig, part: PackedCandidates) -> PackedCandidates:
    """The same candidates, each as a row of its own."""
    rollout, flat_M = scene.rollout, part.flat_M.tolist()
    rows = rollout.prompts.prompts.take(np.array(flat_M) // GROUP)
    lengths = rollout.lengths_BG.flatten()[flat_M].tolist()
    tokens = rollout.tokens_BGT.flatten(0, 1)[flat_M].numpy()
    paths = TokenRows.from_lists([path[:length] for path, length in zip(tokens, lengths, strict=True)])
    trie = scene.catalog.trie if rl.policy_space == "trie" else None
    batch, index = tree_batch(rows, paths, np.arange(len(flat_M)), trie)
    return PackedCandidates(batch, part.flat_M, index.answer_N, index.token_N)


@pytest.mark.parametrize("space", ["trie", "vocab"])
def test_every_learning_candidate_is_packed_once_and_every_prompt_too(space):
    rl = replace(PLAIN, policy_space=space, micro_batch_tokens=24)
    scene = Scene(rl)
    packed = scene.actor.pack(scene.rollout, scene.adv_BG, scene.omega_BG)
    learns = (scene.adv_BG * scene.omega_BG != 0).flatten().nonzero().squeeze(1)
    assert sorted(torch.cat([part.flat_M for part in packed]).tolist()) == learns.tolist()
    assert sum(len(part.batch.chain_B) for part in packed) == 4  # the first two groups teach nothing
    for part in packed:
        assert len(part.batch.tokens_S) <= 24 or len(part.batch.chain_B) == 1
        candidates = part.flat_M[part.candidate_N]
        tokens = scene.rollout.tokens_BGT.flatten(0, 1)[candidates, part.token_N]
        assert torch.equal(tokens, part.batch.target_N)
        prompt_lengths = torch.from_numpy(scene.rollout.prompts.prompts.lengths)[candidates // GROUP]
        places = part.batch.index_P[part.batch.row_N]
        assert torch.equal(part.batch.position_S[places], prompt_lengths - 1 + part.token_N)


def test_a_rank_on_which_nothing_learns_keeps_one_candidate_while_another_learns():
    scene = Scene(PLAIN)
    scene.actor.dp = DataParallel(0, 2, lambda mine: [mine, True])
    (part,) = scene.actor.pack(scene.rollout, torch.zeros_like(scene.adv_BG), scene.omega_BG)
    assert part.flat_M.tolist() == [0]
    assert len(part.batch.chain_B) == 1


def test_an_update_raises_the_targets_and_tawin_changes_it():
    scene, plain = Scene(PLAIN), Scene(PLAIN)
    plain.omega_BG = torch.ones_like(plain.omega_BG)
    ones = torch.ones_like(scene.adv_BG)
    packed = scene.actor.pack(scene.rollout, ones, ones)
    hit = torch.cat([scene.rollout.is_target_BG.flatten()[part.flat_M[part.candidate_N]] for part in packed])
    before = torch.cat(scene.trainable.score([part.batch for part in packed]))
    with_tawin, without = scene.update(PLAIN), plain.update(PLAIN)
    after = torch.cat(scene.trainable.score([part.batch for part in packed]))
    assert (after - before)[hit].mean() > (after - before)[~hit].mean()
    assert any(not torch.allclose(with_tawin[name], without[name], atol=1e-4) for name in without)


def test_weight_versions_are_enforced():
    scene = Scene(PLAIN)
    sync_weights(scene.engine, version=4)
    with pytest.raises(TawinError, match="version 0"):
        check_version(scene.rollout, expected=4)
    with pytest.raises(TawinError, match="older"):
        sync_weights(scene.engine, version=3)


def test_rollout_and_training_agree_before_the_first_update():
    scene = Scene(replace(PLAIN, inner_updates=2), targets=False)
    ones = torch.ones_like(scene.adv_BG)
    packed = scene.actor.pack(scene.rollout, ones, ones)
    stats = scene.actor.update(scene.rollout, packed, scene.adv_BG + 1, ones, None, lr=1e-2)
    assert abs(stats["mismatch_kl"]) < 1e-9
    assert stats["mismatch_prob_error"] < LOGP_ATOL
    assert stats["shift_kl"] > 1e-6  # the second update sees what the first one changed


@pytest.mark.parametrize("kl_groups", ["all", "informative"])
def test_the_kl_of_groups_without_reward_difference_can_be_switched_off(kl_groups):
    rl = RlConfig(beta=0.3, kl_groups=kl_groups)
    scene = Scene(rl)
    packed = scene.actor.pack(scene.rollout, scene.adv_BG, scene.omega_BG)
    groups = sorted({int(flat) // GROUP for part in packed for flat in part.flat_M})
    assert groups == ([0, 1, 2, 3, 4, 5] if kl_groups == "all" else [2, 3, 4, 5])
    assert sum(len(part.flat_M) for part in packed) == len(groups) * GROUP
    # the KL that is logged is that of these groups, over the candidates of all
    own = scene.actor.behaviour_logprobs(scene.rollout, packed)
    stats = scene.actor.update(
        scene.rollout, packed, scene.adv_BG, scene.omega_BG, [logp_N + 0.5 for logp_N in own], lr=0.0
    )
    lengths_C, k3 = scene.rollout.lengths_BG.flatten(), np.expm1(0.5) - 0.5
    scored_C = torch.zeros(len(lengths_C))
    for part in packed:
        scored_C.index_add_(0, part.flat_M[part.candidate_N], torch.ones(len(part.candidate_N)))
    expected = k3 * float((scored_C / lengths_C).sum()) / len(lengths_C)
    assert stats["kl"] == pytest.approx(expected, rel=1e-3)


def test_without_any_informative_group_one_candidate_is_packed():
    scene = Scene(RlConfig(beta=0.3, kl_groups="informative"))
    packed = scene.actor.pack(scene.rollout, torch.zeros_like(scene.adv_BG), scene.omega_BG)
    assert sum(len(part.flat_M) for part in packed) == 1
