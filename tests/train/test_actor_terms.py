"""What may stand beside the policy term: an SFT term, inserted targets and their corrections, importance weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tawin_nemo.data.trees import tree_batch
from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.models.megatron.optim.trainable import MicroBatch
from tawin_nemo.rollout.groups import ensure_target
from tawin_nemo.train.actor import insertion_ratios, weighted_groups
from tests.train.actor_scene import LOGP_ATOL, PLAIN, WEIGHT_ATOL, Scene


def test_ensure_target_puts_the_path_last_and_the_actor_scores_it():
    scene = Scene(PLAIN, targets=False)
    full = ensure_target(scene.rollout, scene.catalog)
    lacking = (~scene.rollout.is_target_BG.any(dim=1)).nonzero().squeeze(1).tolist()
    assert lacking
    assert full.is_target_BG.any(dim=1).all()
    ones = torch.ones_like(scene.adv_BG)
    packed = scene.actor.pack(full, ones, ones)
    assert full.logprobs_BGT is not None
    assert full.logprobs_BGT[full.inserted_BG].isnan().any(dim=1).all()
    assert not full.logprobs_BGT[~full.inserted_BG].isnan().any()
    scored = scene.trainable.score([part.batch for part in packed])
    behaviour = scene.actor.behaviour_logprobs(full, packed)
    torch.testing.assert_close(torch.cat(behaviour), torch.cat(scored), atol=LOGP_ATOL, rtol=0)
    for row in range(len(full.prompts)):
        if row in lacking:
            target = int(full.prompts.target_B[row])
            length = int(full.lengths_BG[row, -1])
            assert full.tokens_BGT[row, -1, :length].tolist() == scene.catalog.paths[target].tolist()
            assert (full.scores_BG[row, -1] <= full.scores_BG[row, :-1]).all()
        else:
            assert torch.equal(full.items_BG[row], scene.rollout.items_BG[row])


def test_the_sft_term_is_the_cross_entropy_of_the_targets():
    """With advantages of 0 an update with sft_weight 1 is an SFT step in the policy's space on the same prompts."""
    rl = replace(PLAIN, sft_weight=1.0, policy_space="vocab", micro_batch_tokens=40)
    learned, expected = Scene(rl, targets=False), Scene(PLAIN, targets=False)
    zeros = torch.zeros_like(learned.adv_BG)
    packed = learned.actor.pack(learned.rollout, zeros, zeros)
    num = learned.rollout.items_BG.numel()
    added = torch.cat([part.flat_M[part.flat_M >= num] for part in packed])
    assert sorted(added.tolist()) == [num + b for b in range(6)]
    stats = learned.actor.update(learned.rollout, packed, zeros, zeros, None, lr=1e-3)

    targets = expected.catalog.paths.take(expected.rollout.prompts.target_B.numpy())
    batch, _ = tree_batch(expected.rollout.prompts.prompts, targets, np.arange(6), None)
    total = int(targets.lengths.sum())

    def cross_entropy(logp_N):
        loss = -logp_N.sum() / total
        return loss, {"loss": loss.detach()}

    sft = expected.trainable.update([MicroBatch(batch, cross_entropy)], lr=1e-3)
    assert stats["sft_loss"] == pytest.approx(sft["loss"], rel=1e-5)
    assert stats["grad_norm"] == pytest.approx(sft["grad_norm"], rel=1e-4)
    for name, value in expected.weights().items():
        torch.testing.assert_close(learned.weights()[name], value, atol=WEIGHT_ATOL, rtol=0, msg=name)


def test_the_sft_term_leaves_the_policy_term_alone():
    both, plain = Scene(replace(PLAIN, sft_weight=0.5)), Scene(PLAIN)
    got = [
        scene.actor.update(
            scene.rollout, scene.actor.pack(scene.rollout, scene.adv_BG, scene.omega_BG),
            scene.adv_BG, scene.omega_BG, None, lr=1e-3,
        )
        for scene in (both, plain)
    ]  # fmt: skip
    assert got[0]["policy_loss"] == pytest.approx(got[1]["policy_loss"], rel=1e-5)
    assert got[0]["loss"] == pytest.approx(got[0]["policy_loss"] + 0.5 * got[0]["sft_loss"], rel=1e-5)
    assert got[0]["scored_tokens"] == got[1]["scored_tokens"]


def test_truncated_importance_weights_correct_a_rollout_of_another_policy():
    """Stored log-probs below the training pass's own: ratios above the cap are cut to it and scale the gradient."""
    capped, plain = Scene(replace(PLAIN, importance_cap=1.5), targets=False), Scene(PLAIN, targets=False)
    ones = torch.ones_like(capped.adv_BG)
    assert capped.rollout.logprobs_BGT is not None
    capped.rollout = replace(capped.rollout, logprobs_BGT=capped.rollout.logprobs_BGT - 2.0)
    got = [
        scene.actor.update(scene.rollout, scene.actor.pack(scene.rollout, ones, ones), ones, ones, None, lr=0.0)
        for scene in (capped, plain)
    ]
    assert got[0]["ratio_mean"] == pytest.approx(1.0)  # the ratio is to the training pass's own old policy
    assert got[0]["grad_norm"] == pytest.approx(1.5 * got[1]["grad_norm"], rel=1e-4)


def test_weighted_groups_touch_only_groups_with_an_inserted_target():
    adv_BG = torch.arange(6.0).view(3, 2)
    inserted_BG = torch.tensor([[False, False], [False, True], [False, False]])
    assert weighted_groups(adv_BG, inserted_BG, 0.1).flatten().tolist() == pytest.approx([0, 1, 0.2, 0.3, 4, 5])
    assert weighted_groups(adv_BG, None, 0.1) is adv_BG


def test_insertion_ratios_compare_the_target_with_the_last_candidate_found():
    """Against sums of the training pass's own log-probs, in micro-batches and with added targets in the trees."""
    rl = replace(
        PLAIN, inserted_correction="ratio", ensure_target="replace_last", sft_weight=1.0, micro_batch_tokens=40
    )
    scene = Scene(rl)
    rollout, ones = scene.rollout, torch.ones_like(scene.adv_BG)
    packed = scene.actor.pack(rollout, ones, ones)
    got_B = insertion_ratios(rollout, packed, scene.actor.behaviour_logprobs(rollout, packed))
    inserted_B = rollout.inserted_BG.any(dim=1)
    assert inserted_B.any()
    assert (got_B[~inserted_B] == 1).all()
    rows = inserted_B.nonzero().squeeze(1).tolist()
    targets = scene.catalog.paths.take(rollout.prompts.target_B[rows].numpy())
    batch, index = tree_batch(
        rollout.prompts.prompts.take(np.array(rows)), targets, np.arange(len(rows)), scene.catalog.trie
    )
    (logp_N,) = scene.trainable.score([batch])
    score_M = torch.zeros(len(rows)).index_add(0, index.answer_N, logp_N)
    for place, row in enumerate(rows):
        lowest = rollout.scores_BG[row][~rollout.inserted_BG[row] & rollout.valid_BG[row]].min()
        assert got_B[row].item() == pytest.approx(min(1.0, float((score_M[place] - lowest).exp())), rel=1e-3)
    assert (got_B[inserted_B] < 1).all()
    assert insertion_ratios(replace(rollout, inserted_BG=None), packed, []).tolist() == [1.0] * 6


def test_the_correction_scales_the_whole_group():
    """One inserted group with a ratio r: its gradient is r times that without the correction."""
    rl = replace(PLAIN, inserted_correction="ratio", ensure_target="replace_last")
    corrected, plain = Scene(rl), Scene(PLAIN)
    row = int(corrected.rollout.inserted_BG.any(dim=1).nonzero()[0])
    got = []
    for scene in (corrected, plain):
        scene.adv_BG = group_advantages(scene.rollout.is_target_BG.float())
        scene.adv_BG[torch.arange(6) != row] = 0.0
        packed = scene.actor.pack(scene.rollout, scene.adv_BG, scene.omega_BG)
        got.append(scene.actor.update(scene.rollout, packed, scene.adv_BG, scene.omega_BG, None, lr=0.0)["grad_norm"])
    packed = corrected.actor.pack(corrected.rollout, corrected.adv_BG, corrected.omega_BG)
    ratio_B = insertion_ratios(corrected.rollout, packed, corrected.actor.behaviour_logprobs(corrected.rollout, packed))
    assert got[0] == pytest.approx(float(ratio_B[row]) * got[1], rel=1e-3)
