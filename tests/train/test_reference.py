"""References on a real nano model: swapped equals copied, and both follow the actor as asked."""

import pytest
import torch

from tawin_nemo.config.schema import LoraConfig, ModelConfig, TrainerConfig
from tawin_nemo.models.megatron.model.adapters import add_adapters
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.train.reference import CopiedReference, Refresh, SwappedReference, build_reference
from tests.train.actor_scene import PLAIN, SHAPE, Scene


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


@pytest.mark.parametrize(("mode", "beta"), [("copy", 0.0), ("swap", 0.0), ("off", 0.1)])
def test_without_a_kl_term_no_reference_is_loaded_or_scored(mode, beta):
    actor_model = object()  # not even looked at
    reference = build_reference(mode, beta, actor_model, lambda: pytest.fail("a reference was loaded"))
    assert reference.logprobs([object()]) is None
    reference.follow(actor_model, keep=0.5)


def test_the_reference_of_adapters_is_the_model_that_they_were_added_to():
    """The same bits as a copy of it, before and after updates of the adapters, which are on again behind the pass."""
    scene = Scene(PLAIN)  # its engine searches with the model that gets adapters
    ones = torch.ones_like(scene.adv_BG)
    batches = [part.batch for part in scene.actor.pack(scene.rollout, ones, ones)]
    copied = torch.cat(CopiedReference(build_model(SHAPE, ModelConfig(), seed=3)).logprobs(batches))
    model = build_model(SHAPE, ModelConfig(), seed=3)
    add_adapters(model, SHAPE, LoraConfig(rank=4), seed=1, base={})
    reference = build_reference("copy", 0.1, model, lambda: pytest.fail("a copy of the model was built"))
    assert torch.equal(torch.cat(reference.logprobs(batches)), copied)
    scene.trainable = Trainable(model, SHAPE, TrainerConfig(), lr=1e-2)
    for _ in range(2):
        scene.update(PLAIN)
    moved = torch.cat(scene.trainable.score(batches))
    assert (moved - copied).abs().max() > 1e-3
    assert torch.equal(torch.cat(reference.logprobs(batches)), copied)
    reference.follow(model, 1.0)
    assert torch.equal(torch.cat(scene.trainable.score(batches)), moved)


@pytest.mark.parametrize("kind", ["copy", "swap"])
def test_a_reference_follows_the_actor(kind, tmp_path):
    scene = Scene(PLAIN)
    ones = torch.ones_like(scene.adv_BG)
    batches = [part.batch for part in scene.actor.pack(scene.rollout, ones, ones)]
    initial = build_model(SHAPE, ModelConfig(), seed=4)
    start = {name: value.detach().clone() for name, value in initial.named_parameters()}
    reference = CopiedReference(initial)
    kept = {name: value.clone() for name, value in start.items()}
    places = [value.data_ptr() for value in kept.values()]
    if kind == "swap":
        reference = SwappedReference(scene.trainable.model, kept)
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
    assert [value.data_ptr() for value in kept.values()] == places  # pinned memory would stay pinned


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA device")
def test_swapped_weights_are_pinned():
    scene = Scene(PLAIN)
    reference = build_reference("swap", 0.1, scene.trainable.model, lambda: build_model(SHAPE, ModelConfig(), seed=4))
    assert isinstance(reference, SwappedReference)
    reference.follow(scene.trainable.model, 0.5)
    assert all(value.is_pinned() for value in reference._weights.values())


def test_refresh_says_what_is_kept():
    assert [Refresh("every", steps=2).keeps(step) for step in (1, 2, 3, 4)] == [1.0, 0.0, 1.0, 0.0]
    assert [Refresh("ema", decay=0.9).keeps(step) for step in (1, 2)] == [0.9, 0.9]
    assert Refresh().keeps(7) == 1.0
