"""The plan of a run with adapters: gradients, moments, exchange and FLOPs are those of the adapters; no reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tawin_nemo.config.backbones import FlopCount, backbone
from tawin_nemo.config.gpus import GPUS
from tawin_nemo.config.layout import Layout
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.lora import layer_parameters
from tawin_nemo.config.schema import LoraConfig, ModelConfig
from tawin_nemo.tools.plan.memory import adapter_parameters, peaks, resident, swap_bytes
from tawin_nemo.tools.plan.plan import Plan
from tawin_nemo.tools.plan.timing import Rates
from tawin_nemo.tools.plan.verb import plan_recipe
from tawin_nemo.tools.plan.work import TITLES, Numbers
from tawin_nemo.util.errors import ConfigError

RECIPE = Path(__file__).parents[3] / "recipes" / "lora_llama2_7b.yaml"
LLAMA = backbone("llama-2-7b")


def plan(*words: str) -> Plan:
    return plan_recipe(RECIPE, words, lambda folder: pytest.fail(f"{folder} was read"))


def test_the_7b_recipe_fits_one_node_with_one_model_per_gpu() -> None:
    found = plan()
    assert found.best == found.layout == Layout(dp=8)
    parts = found.fullest.parts
    adapters = 2 * 19_988_480  # PEFT's count for rank 8, twice
    assert parts.weights == 2 * (6_738_415_616 + adapters)
    assert parts.gradients == 4 * adapters
    assert parts.optimizer == 12 * adapters / 8
    assert parts.total < 80 * 2**30
    with pytest.raises(ConfigError, match="does not fit"):
        plan("model.lora.rank=0")
    with pytest.raises(ConfigError, match=r"model\.lora\.rank=5000 is more than the smaller side"):
        plan("model.lora.rank=5000")


def test_adapters_need_no_memory_for_a_reference() -> None:
    for mode in ("copy", "swap"):
        words = ["rl.beta=0.1", f"reference.mode={mode}", "model.backbone=llama-2-7b"]
        recipe = load_recipe(None, words)
        adapted = load_recipe(None, [*words, "model.lora.rank=8"])
        reference = {p.phase: p.parts.reference for p in peaks(LLAMA, recipe, Layout(), TITLES)}
        assert (reference["RL update"] > 0) == (mode == "copy")
        assert (swap_bytes(LLAMA, recipe, Layout()) > 0) == (mode == "swap")
        assert all(p.parts.reference == 0 for p in peaks(LLAMA, adapted, Layout(), TITLES))
        assert swap_bytes(LLAMA, adapted, Layout()) == 0


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], LoraConfig().target_modules])
def test_the_count_is_that_of_a_model(targets: list[str]) -> None:
    from tawin_nemo.models.megatron.model.adapters import add_adapters
    from tawin_nemo.models.megatron.model.build import build_model
    from tawin_nemo.models.megatron.parallel import runtime

    shape, lora = replace(backbone("nano"), vocab=40), LoraConfig(rank=4, target_modules=targets)
    runtime.initialize(ModelConfig(), seed=0)
    model = build_model(shape, ModelConfig(), seed=0)
    add_adapters(model, shape, lora, seed=0, base={})
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == shape.layers * layer_parameters(shape, lora) == adapter_parameters(shape, lora, Layout(), 0)
    recipe = load_recipe(None, ["model.lora.rank=4", f"model.lora.target_modules=[{','.join(targets)}]"])
    parts = resident(shape, recipe, Layout(), Numbers.of("fp32", device="cpu"), 0)
    assert (parts.gradients, parts.optimizer) == (4 * trained, 8 * trained)


def test_times_count_no_backward_to_frozen_weights() -> None:
    work = FlopCount(tokens=1_000_000)
    rates = Rates(LLAMA, Layout(dp=8), GPUS["h800"], "bf16", 0.5, "none", lora=LoraConfig(rank=8))
    dense = replace(rates, lora=LoraConfig())
    assert rates.training(work, 4) == pytest.approx(2 * rates.forward(work))
    assert dense.training(work, 4) == pytest.approx(3 * rates.forward(work))
    assert rates.exchange() == pytest.approx(dense.exchange() * 19_988_480 / 6_738_415_616)
