"""What only a CUDA device can show; ``run.sh`` runs these as its part "pytest". Skipped, with the reason, elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, RolloutConfig, TrainerConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model import precision
from tawin_nemo.models.megatron.model.build import build_model, build_search_model
from tawin_nemo.models.megatron.model.reshard import SharedWeights
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.groups import found_in_both
from tawin_nemo.types import TokenRows
from tests.gpu import parts
from tests.gpu.split_model import run_split_model
from tests.gpu.workload import TINY, Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: A width that FP8 can cut; everything else as in a dry run.
SHAPE = Backbone("qwen2", 256, 4, 4, 2, 512, 211, rope_theta=1e4, max_position=256, init_std=0.05)
BATCHES = 12


def needs(name: str) -> None:
    lacking = precision.unsupported_reason(name, precision.this_machine())
    if lacking is not None:
        pytest.skip(lacking.reason)


def trained(name: str, **model: object) -> tuple[Trainable, list[float]]:
    cfg = ModelConfig(precision=name, **model)  # type: ignore[arg-type]
    runtime.initialize(cfg, seed=0)
    trainable = Trainable(build_model(SHAPE, cfg, seed=1), SHAPE, TrainerConfig(), lr=1e-3)
    load = Workload(TINY)
    losses = [trainable.update(list(load.micro_batches(step)), lr=1e-3)["loss"] for step in range(BATCHES)]
    return trainable, losses


def test_two_call_attention_equals_a_dense_softmax():
    errors = parts.attention()
    for dtype, tolerance in parts.ATTENTION_TOLERANCE.items():
        assert max(errors[str(dtype).removeprefix("torch.")].values()) <= tolerance


def test_bf16_learns_what_float32_learns():
    _, wide = trained("fp32")
    _, narrow = trained("bf16")
    assert narrow[-1] < wide[0]
    assert narrow == pytest.approx(wide, rel=0.02)


@pytest.mark.parametrize("name", precision.FP8)
def test_fp8_learns_what_bf16_learns(name):
    needs(name)
    _, want = trained("bf16")
    _, have = trained(name)
    assert have == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("name", [name for name in precision.FP8 if name != "fp8-delayed"])
def test_fp8_with_bf16_ends_and_recomputation(name):
    needs(name)
    _, want = trained(name)
    _, ends = trained(name, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1)
    _, again = trained(name, recompute="full")
    assert ends == pytest.approx(want, rel=0.05)
    assert again == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("name", ["bf16", *precision.FP8])
def test_a_search_after_a_step_runs_the_new_weights(name):
    """Quantised weights must not be kept from the training pass: the search agrees with a model loaded afresh."""
    needs(name)
    trainable, _ = trained(name)
    fresh = build_model(SHAPE, ModelConfig(precision=name), seed=2)
    fresh.load_state_dict(trainable.model.state_dict())
    prompts = TokenRows.from_lists([[5, 9, 3, 30], [7, 2]])
    tokens = torch.arange(2, 40)
    scores = []
    kept = MegatronLM(trainable.model, SHAPE, keep_quantised=True)
    for lm in (kept, MegatronLM(trainable.model, SHAPE), MegatronLM(fresh, SHAPE)):
        cache = lm.prefill(prompts)
        rows = torch.arange(2)
        scores.append(lm.logprobs(cache, rows, rows.repeat_interleave(len(tokens)), tokens.repeat(2), "vocab"))
    assert torch.equal(scores[0], scores[1])
    torch.testing.assert_close(scores[1], scores[2], rtol=0, atol=1e-3 if name == "fp8-delayed" else 1e-5)


@pytest.mark.parametrize("name", precision.FP8)
def test_weights_that_decoding_keeps_are_those_of_the_last_update(name):
    needs(name)
    runtime.initialize(ModelConfig(precision=name), seed=1)
    model = build_model(SHAPE, ModelConfig(precision=name), seed=2)
    kept, prompts, rows = (
        MegatronLM(model, SHAPE, keep_quantised=True),
        TokenRows.from_lists([[5, 9, 3]]),
        torch.arange(1),
    )

    def scores(lm):
        return lm.logprobs(lm.prefill(prompts), rows, rows.repeat_interleave(38), torch.arange(2, 40), "vocab")

    before = scores(kept)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    kept.weights_changed()
    after = scores(kept)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(after, scores(MegatronLM(model, SHAPE)))


@pytest.mark.parametrize("name", precision.FP8)
def test_a_search_in_bf16_with_the_weights_of_fp8_finds_much_the_same(name):
    """Rollouts in another precision than training; the models share their weights, either may be the trained one."""
    needs(name)
    cfg, load = ModelConfig(precision=name), Workload(replace(TINY, shape=SHAPE))
    runtime.initialize(cfg, seed=1)
    model = build_model(SHAPE, cfg, seed=2)
    wide = build_search_model(SHAPE, model, replace(cfg, precision="bf16"))
    SharedWeights(model, wide)()
    options = {"negatives": "beam", "policy_space": "trie", "step": 0}
    engines = (RolloutEngine(MegatronLM(each, SHAPE), load.catalog, RolloutConfig(), seed=0) for each in (model, wide))
    own, other = (engine.generate(load.prompt_batch(0), 6, **options).to("cpu") for engine in engines)
    found, candidates = found_in_both(own, other)
    assert found >= candidates / 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("order", ["update,search,update", "search,update"])
@pytest.mark.parametrize("name", ["bf16", *precision.FP8])
def test_searches_and_updates_in_any_order_under_sequence_parallelism(name, order):
    """Transformer Engine fixes a module's quantisers in its first pass, whichever kind of pass that is."""
    needs(name)
    run_split_model(name, order)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_lean_forward_equals_the_modules(name):
    """On a CPU bit for bit; here megatron's fused functions may round an intermediate value elsewhere."""
    needs(name)
    runtime.initialize(ModelConfig(precision=name), seed=1)
    model = build_model(SHAPE, ModelConfig(precision=name), seed=2)
    prompts = TokenRows.from_lists([[5, 9, 3, 30], [7, 2]])
    tokens, rows = torch.arange(2, 40), torch.arange(2)
    scores = []
    for use_inference_forward in (True, False):
        lm = MegatronLM(model, SHAPE, use_inference_forward=use_inference_forward)
        cache = lm.extend(lm.prefill(prompts), rows, TokenRows.from_lists([[11, 12], [13]]))
        ends = torch.tensor([3, 4])
        scores.append(lm.logprobs(cache, ends, rows.repeat_interleave(len(tokens)), tokens.repeat(2), "vocab"))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5 if name == "fp32" else 2e-2)
