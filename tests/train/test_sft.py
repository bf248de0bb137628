"""Early stopping: what counts as progress, what stays the best, when SFT ends; and what the loss is."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import CompareConfig, EvalConfig, ModelConfig, Recipe, SftConfig, TrainerConfig
from tawin_nemo.data.samples import Samples
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.head import full_logits_NV
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.stage import Progress
from tawin_nemo.train import evaluation, sft
from tawin_nemo.train.pipeline import sft_section
from tawin_nemo.train.sft_data import item_batches
from tawin_nemo.types import DataParallel, TokenRows

SHAPE = Backbone("qwen2", 32, 2, 4, 2, 48, 40, rope_theta=1e4, max_position=64, init_std=0.3)


@pytest.mark.parametrize(
    ("losses", "min_delta", "best_step", "bad_checks"),
    [
        ([3.0, 2.0, 1.0], 0.0, 2, 0),
        ([3.0, 2.0, 2.5], 0.0, 1, 1),
        ([3.0, 2.0, 2.5, 2.1], 0.0, 1, 2),
        # better by less than min_delta: the best so far, yet no progress
        ([3.0, 2.0, 1.95], 0.1, 2, 1),
        ([3.0, 2.0, 1.95, 1.92], 0.1, 3, 2),
    ],
)
def test_checks(monkeypatch, losses, min_delta, best_step, bad_checks):
    written: list[float] = []
    saved: list[int] = []
    stage = SimpleNamespace(
        name="sft",
        write=lambda step, metrics: written.append(metrics["valid/loss"]),
        save=lambda trainable, done: saved.append(done.best_step),
    )
    world = SimpleNamespace(recipe=Recipe(sft=SftConfig(min_delta=min_delta)))
    done, values = Progress(), iter(losses)
    monkeypatch.setattr(sft, "valid_loss", lambda world, trainable: next(values))
    for step in range(len(losses)):
        done.step = step
        sft._validate(world, stage, None, None, done)
    assert (done.best_step, done.bad_checks) == (best_step, bad_checks)
    assert written == losses
    assert saved[-1] == best_step


def test_ndcg_decides_when_it_is_watched(monkeypatch):
    """The loss is best first, NDCG last; the other way round NDCG would be ignored."""
    losses, ndcgs, written = iter([1.0, 2.0, 3.0, 4.0]), iter([0.1, 0.3, 0.2, 0.305]), []
    stage = SimpleNamespace(name="sft", write=lambda step, seen: written.append(seen), save=lambda *unused: None)
    recipe = Recipe(sft=SftConfig(watch="ndcg", min_delta=0.01), eval=EvalConfig(beams=50, ks=[1, 10]))
    world = SimpleNamespace(recipe=recipe, samples={"valid": None}, catalog=None, dp=DataParallel())

    def search(engine, samples, catalog, cfg, **named):
        assert cfg.beams == 10
        return SimpleNamespace(means={"ndcg@10": next(ndcgs), "recall@10": 0.5, "ndcg@1": 0.0})

    monkeypatch.setattr(sft, "valid_loss", lambda world, trainable: next(losses))
    monkeypatch.setattr(evaluation, "evaluate", search)
    done, bad, received = Progress(), [], []
    trainable = SimpleNamespace(optimizer_offloaded=nullcontext)
    engine = SimpleNamespace(dp=None, receive_weights=lambda: received.append(done.step))
    for step in range(4):
        done.step = step
        sft._validate(world, stage, trainable, engine, done)
        bad.append(done.bad_checks)
    assert received == [0, 1, 2, 3]
    assert done.best_step == 3
    assert bad == [0, 0, 1, 2]  # .305 is the best, but within min_delta of .3
    assert written[1] == {"valid/loss": 2.0, "valid/recall@10": 0.5, "valid/ndcg@1": 0.0, "valid/ndcg@10": 0.3}


def test_sft_continued_may_have_its_own_learning_rate():
    recipe = Recipe(sft=SftConfig(lr=2e-3, schedule="cosine"), compare=CompareConfig(sft_continued_lr=3e-4))
    continued = sft_section(recipe, "sft_continued")
    assert (continued.lr, continued.schedule) == (3e-4, "constant")
    assert sft_section(recipe, "sft_all") is recipe.sft
    assert sft_section(Recipe(), "sft_continued") == Recipe().sft


def world(loss_space: str, micro_batch_tokens: int) -> SimpleNamespace:
    """Twelve samples over a catalog of forty items."""
    draw = np.random.default_rng(5)
    paths = sorted({tuple(draw.integers(2, 9, size=draw.integers(2, 5)).tolist()) for _ in range(40)})
    rows = TokenRows.from_lists([[*path, 1] for path in paths])
    titles = [str(item) for item in range(len(rows))]
    prompts = TokenRows.from_lists([draw.integers(2, 40, size=draw.integers(1, 9)) for _ in range(12)])
    nobody, targets = np.zeros(12, np.int64), draw.integers(0, len(rows), size=12)
    return SimpleNamespace(
        recipe=Recipe(sft=SftConfig(loss_space=loss_space, micro_batch_tokens=micro_batch_tokens)),
        catalog=Catalog(titles, titles, "title", rows, TokenTrie.from_paths(rows)),
        samples={"valid": Samples(prompts, targets, nobody, prompts)},
        dp=DataParallel(),
    )


@torch.no_grad()
def slow_losses(world: SimpleNamespace, trainable: Trainable, space: str) -> list[float]:
    """Minus the log-prob of every scored token, from one plain forward pass over the tokens before it."""
    samples, paths, losses = world.samples["valid"], [path.tolist() for path in world.catalog.paths], []
    for row, item in enumerate(samples.target_N.tolist()):
        for place, token in enumerate(paths[item]):
            before = [*samples.prompts[row].tolist(), *paths[item][:place]]
            admissible = sorted({path[place] for path in paths if path[:place] == paths[item][:place]})
            hidden_SBD = trainable.model.eval()(torch.tensor([before]), None, None)
            logits_V = full_logits_NV(trainable.model, hidden_SBD[-1])[0]
            if space == "vocab":
                losses.append(float(logits_V.logsumexp(0) - logits_V[token]))
            elif len(admissible) > 1:
                losses.append(float(logits_V[admissible].logsumexp(0) - logits_V[token]))
    return losses


@pytest.mark.parametrize("budget", [16, 4096])
@pytest.mark.parametrize("space", ["vocab", "trie"])
def test_packed_rows_have_the_loss_of_single_ones(space, budget):
    runtime.initialize(ModelConfig(), seed=0)
    surroundings = world(space, budget)
    trainable = Trainable(build_model(SHAPE, ModelConfig(), seed=3), SHAPE, TrainerConfig(), lr=1e-3)
    losses = slow_losses(surroundings, trainable, space)
    assert sft.valid_loss(surroundings, trainable) == pytest.approx(np.mean(losses), rel=1e-5)
    micro = sft.sft_micro_batches(surroundings, item_batches(surroundings, surroundings.samples["valid"]))
    assert (len(micro) > 4) == (budget == 16)
    stats = trainable.update(micro, lr=0.0)
    assert stats["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert stats["grad_norm"] > 1e-2
