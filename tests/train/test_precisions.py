"""Reference and evaluation in a precision of their own: which model is built, and what weights it then has."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.train import pipeline, start
from tawin_nemo.train.reference import CopiedReference
from tawin_nemo.train.start import checkpoint_model
from tests.train.actor_scene import SHAPE

BF16, FP32 = ModelConfig(precision="bf16"), ModelConfig()


@pytest.fixture(autouse=True)
def _one_process() -> None:
    runtime.initialize(ModelConfig(), seed=1)


def world(*overrides: str) -> Any:
    recipe = load_recipe(None, ["model.precision=bf16", *overrides])
    tokenizer = SimpleNamespace(fingerprint="0" * 64)
    return SimpleNamespace(recipe=recipe, shape=SHAPE, tokenizer=tokenizer, item_vectors_fingerprint="")


def dtype(model: torch.nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def test_a_bf16_checkpoint_is_evaluated_in_float32(tmp_path):
    trained = build_model(SHAPE, BF16, seed=3)
    checkpoint.save_checkpoint(tmp_path / "step_1", model=trained, state={})
    here = world("eval.precision=fp32", f"checkpoint={tmp_path}/step_1")
    wide, same = checkpoint_model(here, here.recipe.eval.precision), checkpoint_model(here)
    assert (dtype(wide), dtype(same)) == (torch.float32, torch.bfloat16)
    for name, value in trained.named_parameters():
        assert torch.equal(dict(wide.named_parameters())[name], value.float())
        assert torch.equal(dict(same.named_parameters())[name], value)


def test_reference_and_start_of_a_stage(monkeypatch):
    here = world("reference.precision=fp32")
    actor = start.starting_model(here, None)
    assert dtype(actor) == torch.bfloat16
    plan = pipeline.Plan("rl", None, [], "rl")
    reference = pipeline.reference_for(here, plan, actor)
    assert isinstance(reference, CopiedReference)
    assert dtype(reference._model) == torch.float32
    as_training = pipeline.reference_for(world(), plan, actor)
    assert isinstance(as_training, CopiedReference)
    assert dtype(as_training._model) == torch.bfloat16


@pytest.mark.parametrize("keep", [0.0, 0.75])
def test_a_float32_reference_follows_a_bf16_actor(keep):
    actor, initial = build_model(SHAPE, BF16, seed=3), build_model(SHAPE, replace(FP32), seed=4)
    start = {name: value.detach().clone() for name, value in initial.named_parameters()}
    CopiedReference(initial).follow(actor, keep)
    for name, value in actor.named_parameters():
        want = keep * start[name] + (1.0 - keep) * value.detach().float()
        torch.testing.assert_close(dict(initial.named_parameters())[name].detach(), want, rtol=1e-6, atol=1e-7)
