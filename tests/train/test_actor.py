"""Actor and references on a real nano model: what is left out changes nothing, what is stored equals what is scored."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tawin_nemo.backbones import Backbone
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config import ModelConfig, RlConfig, RolloutConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.errors import TawinError
from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.maths.tawin import tawin_weights
from tawin_nemo.models.megatron import parallel
from tawin_nemo.models.megatron.build import build_model
from tawin_nemo.models.megatron.lm import MegatronLM
from tawin_nemo.models.megatron.trainable import MicroBatch, Trainable
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.ensure_target import ensure_target
from tawin_nemo.train.actor import Actor, PackedCandidates, insertion_ratios, weighted_groups
from tawin_nemo.train.reference import CopiedReference, Refresh, SwappedReference
from tawin_nemo.train.weight_sync import check_version, sync_weights
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
        parallel.initialize(ModelConfig(), seed=0)
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
        places = part.batch.place_P[part.batch.row_N]
        assert torch.equal(part.batch.position_S[places], prompt_lengths - 1 + part.token_N)


def test_a_rank_on_which_nothing_learns_keeps_one_candidate():
    scene = Scene(PLAIN)
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


def test_swapped_reference_equals_a_copy_and_leaves_the_actor_alone():
    scene = Scene(PLAIN)
    initial = build_model(SHAPE, ModelConfig(), seed=3)
    ones = torch.ones_like(scene.adv_BG)
    batches = [part.batch for part in scene.actor.pack(scene.rollout, ones, ones)]
    copied = CopiedReference(initial).logprobs(batches)
    weights = {name: value.detach().clone() for name, value in initial.named_parameters()}
    scene.update(PLAIN)
    moved = scene.weights()
    swapped = SwappedReference(scene.trainable.model, weights).logprobs(batches)
    assert torch.equal(torch.cat(copied), torch.cat(swapped))
    assert all(torch.equal(value, moved[name]) for name, value in scene.weights().items())
    assert not torch.equal(torch.cat(scene.trainable.score(batches)), torch.cat(swapped))


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


def test_weight_versions_are_enforced():
    scene = Scene(PLAIN)
    sync_weights(scene.engine, version=4)
    with pytest.raises(TawinError, match="version 0"):
        check_version(scene.rollout, expected=4)
    with pytest.raises(TawinError, match="older"):
        sync_weights(scene.engine, version=3)


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


def test_rollout_and_training_agree_before_the_first_update():
    scene = Scene(replace(PLAIN, inner_updates=2), targets=False)
    ones = torch.ones_like(scene.adv_BG)
    packed = scene.actor.pack(scene.rollout, ones, ones)
    stats = scene.actor.update(scene.rollout, packed, scene.adv_BG + 1, ones, None, lr=1e-2)
    assert abs(stats["mismatch_kl"]) < 1e-9
    assert stats["mismatch_prob_error"] < LOGP_ATOL
    assert stats["shift_kl"] > 1e-6  # the second update sees what the first one changed


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


@pytest.mark.parametrize("kind", ["copy", "swap"])
def test_a_reference_follows_the_actor(kind, tmp_path):
    scene = Scene(PLAIN)
    ones = torch.ones_like(scene.adv_BG)
    batches = [part.batch for part in scene.actor.pack(scene.rollout, ones, ones)]
    initial = build_model(SHAPE, ModelConfig(), seed=4)
    start = {name: value.detach().clone() for name, value in initial.named_parameters()}
    reference = CopiedReference(initial)
    if kind == "swap":
        reference = SwappedReference(scene.trainable.model, {name: value.clone() for name, value in start.items()})
    before = torch.cat(reference.logprobs(batches))
    reference.follow(scene.trainable.model, 1.0)
    assert torch.equal(torch.cat(reference.logprobs(batches)), before)

    reference.follow(scene.trainable.model, 0.75)
    mixed = build_model(SHAPE, ModelConfig(), seed=5)
    with torch.no_grad():
        for name, value in mixed.named_parameters():
            value.copy_(0.75 * start[name] + 0.25 * scene.weights()[name])
    halfway = torch.cat(reference.logprobs(batches))
    torch.testing.assert_close(halfway, torch.cat(CopiedReference(mixed).logprobs(batches)), atol=1e-5, rtol=0)

    reference.save(tmp_path / "step_1")
    reference.follow(scene.trainable.model, 0.0)
    assert torch.equal(torch.cat(reference.logprobs(batches)), torch.cat(scene.trainable.score(batches)))
    actor_before = scene.weights()
    reference.load(tmp_path / "step_1")
    assert torch.equal(torch.cat(reference.logprobs(batches)), halfway)
    assert all(torch.equal(value, actor_before[name]) for name, value in scene.weights().items())


def test_refresh_says_what_is_kept():
    assert [Refresh("every", steps=2).keeps(step) for step in (1, 2, 3, 4)] == [1.0, 0.0, 1.0, 0.0]
    assert [Refresh("ema", decay=0.9).keeps(step) for step in (1, 2)] == [0.9, 0.9]
    assert Refresh().keeps(7) == 1.0


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
