"""Rollouts in another precision than training, in one process: whose weights they have, and when."""

from types import SimpleNamespace

import pytest
import torch

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model import precision
from tawin_nemo.models.megatron.model.adapters import add_adapters
from tawin_nemo.models.megatron.model.build import build_model, build_search_model
from tawin_nemo.models.megatron.model.reshard import SharedWeights
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.placement.server_engine import ServerEngine
from tawin_nemo.placement.weight_sync import build_engine, check_equal, comparing_engine, sync_weights
from tawin_nemo.util.errors import TawinError
from tests.train.actor_scene import SHAPE, catalog, prompts

FP32, BF16 = ModelConfig(), ModelConfig(precision="bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _one_process():
    runtime.initialize(ModelConfig(), seed=1)


def recipe_of(trained, rollout, *more):
    return load_recipe(None, [f"model.precision={trained}", f"rollout.precision={rollout}", *more])


def searching(engine):
    return engine.lm.lm.model


def weights(model):
    return {name: value.detach() for name, value in model.named_parameters()}


def group(engine, step=0):
    items = catalog()
    return engine.generate(prompts(len(items)), 5, negatives="beam", policy_space="trie", step=step)


@pytest.mark.parametrize(("trained", "rollout"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_rollouts_have_the_weights_of_training_in_their_own_format(trained, rollout):
    recipe = recipe_of(trained, rollout)
    actor = build_model(SHAPE, recipe.model, seed=3)
    engine = build_engine(recipe, actor, SHAPE, catalog())
    own = searching(engine)
    assert own is not actor
    for version in (1, 2):
        with torch.no_grad():
            for value in weights(actor).values():
                value.mul_(0.9)
        with pytest.raises(TawinError, match="weights of training and rollout differ"):
            check_equal(engine)
        sync_weights(engine, version=version)
        check_equal(engine)
        for name, value in weights(own).items():
            assert value.dtype == DTYPES[rollout]
            assert torch.equal(value, weights(actor)[name].to(DTYPES[rollout])), name
    assert group(engine).weight_version == 2


def test_adapters_are_converted_as_well():
    recipe = recipe_of("fp32", "bf16", "model.lora.rank=2")
    actor = build_model(SHAPE, recipe.model, seed=3)
    add_adapters(actor, SHAPE, recipe.model.lora, seed=4, base={})
    engine = build_engine(recipe, actor, SHAPE, catalog())
    sync_weights(engine, version=1)
    check_equal(engine)
    own = weights(searching(engine))
    adapters = [name for name in own if ".lora." in name]
    assert adapters
    assert all(torch.equal(own[name], weights(actor)[name].bfloat16()) for name in adapters)
    assert group(engine).weight_version == 1


@pytest.mark.parametrize("rollout", ["model", "fp32"])
def test_in_one_precision_the_model_itself_searches(rollout):
    actor = build_model(SHAPE, FP32, seed=3)
    assert searching(build_engine(recipe_of("fp32", rollout), actor, SHAPE, catalog())) is actor


def test_evaluation_searches_in_its_own_precision():
    """Whatever precision rollouts have: ``precision`` is that of the model and of its searches."""
    wide = build_model(SHAPE, FP32, seed=3)
    engine = build_engine(recipe_of("bf16", "fp8-blockwise"), wide, SHAPE, catalog(), precision="fp32")
    assert searching(engine) is wide


def test_a_shared_model_searches_with_the_memory_of_training():
    """What an optimizer writes is there at once, also after it has given the weights another place."""
    actor = build_model(SHAPE, BF16, seed=3)
    model = build_search_model(SHAPE, actor, BF16)
    shared = SharedWeights(actor, model)
    with pytest.raises(TawinError, match="not those of training"):
        shared.check_equal()
    shared()
    shared.check_equal()
    name, value = next(iter(weights(actor).items()))
    value.fill_(0.25)
    assert bool((weights(model)[name] == 0.25).all())
    for parameter in actor.parameters():
        parameter.data = parameter.data.clone()
    with pytest.raises(TawinError, match="not those of training"):
        shared.check_equal()
    shared()
    shared.check_equal()
    with pytest.raises(TawinError, match="one layout and number format"):
        SharedWeights(actor, build_search_model(SHAPE, actor, FP32))


@pytest.mark.parametrize(("trained", "rollout"), [("fp8-blockwise", "bf16"), ("bf16", "fp8-blockwise")])
def test_bf16_and_fp8_share_their_weights(trained, rollout, monkeypatch):
    """Both have bf16 parameters of the same names; the layers of FP8 stand in for by those of bf16 here."""
    monkeypatch.setattr(precision, "FP8", {})
    monkeypatch.setattr(precision, "config_fields", lambda cfg: {})
    recipe = recipe_of(trained, rollout)
    actor = build_model(SHAPE, BF16, seed=3)
    engine = build_engine(recipe, actor, SHAPE, catalog())
    own = searching(engine)
    assert own is not actor
    check_equal(engine)
    for parameter in actor.parameters():
        parameter.data = parameter.data * 0.5
    sync_weights(engine, version=1)
    check_equal(engine)
    for name, value in weights(own).items():
        assert value.data_ptr() == weights(actor)[name].data_ptr()
    assert torch.equal(group(engine).items_BG, group(comparing_engine(recipe, actor, SHAPE, catalog())).items_BG)


def test_what_rollouts_are_compared_with():
    actor = build_model(SHAPE, FP32, seed=3)
    assert comparing_engine(recipe_of("fp32", "model"), actor, SHAPE, catalog()) is None
    assert searching(comparing_engine(recipe_of("fp32", "bf16"), actor, SHAPE, catalog())) is actor
    narrow = build_model(SHAPE, BF16, seed=3)
    other = searching(comparing_engine(recipe_of("fp8-blockwise", "model"), narrow, SHAPE, catalog()))
    assert other.config.fp8 is None
    assert next(other.parameters()).dtype == torch.bfloat16


def test_fp8_weights_are_kept_until_the_next_update(monkeypatch):
    """What decoding keeps is dropped by ``receive_weights``, which every update ends with, and by nothing else."""
    told = []
    monkeypatch.setattr(MegatronLM, "weights_changed", lambda self: told.append(self.model))
    actor = build_model(SHAPE, FP32, seed=3)
    for rollout in ("model", "bf16"):
        engine = build_engine(recipe_of("fp32", rollout), actor, SHAPE, catalog())
        told.clear()
        for version in (1, 2):
            sync_weights(engine, version=version)
            group(engine)
            group(engine)
        assert told == [searching(engine)] * 2
    told.clear()
    MegatronLM(actor, SHAPE).prefill(prompts(5).prompts)
    assert told == [actor], "without a promise of the caller every prefill begins with the weights as they are"


@pytest.mark.parametrize(
    ("trained", "rollout", "pushed"), [("fp32", "bf16", "bf16"), ("bf16", "model", "bf16"), ("bf16", "fp32", "fp32")]
)
def test_servers_get_weights_in_the_precision_of_rollouts(trained, rollout, pushed, monkeypatch):
    seen = []
    pool = SimpleNamespace(push=seen.append, close=lambda: None)

    def connected(cfg, expected):
        seen.append(expected.precision)
        return pool

    monkeypatch.setattr("tawin_nemo.placement.server_engine.ServerPool", connected)
    served = ["rollout.placement=server", "rollout.servers=[a]", f"eval.precision={rollout}"]
    recipe = recipe_of(trained, rollout, *served)
    engine = build_engine(recipe, build_model(SHAPE, recipe.model, seed=3), SHAPE, catalog())
    assert isinstance(engine, ServerEngine)
    engine.receive_weights()
    assert seen[0] == pushed
    assert {value.dtype for value in seen[1].values()} == {DTYPES[pushed]}
