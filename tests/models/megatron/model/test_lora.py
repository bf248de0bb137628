"""Adapters (``model.lora``) against dense models with merged weights, whose matrices are put together by Hugging Face
name; what is trained, and what is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import LoraConfig, ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.decode import inference_forward
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.hf.map import hf_names, local_parameters, shard_segments
from tawin_nemo.models.megatron.hf.memory import gather_hf
from tawin_nemo.models.megatron.model.adapters import add_adapters, fold, merge, without_adapters
from tawin_nemo.models.megatron.model.build import HiddenGPT, build_model
from tawin_nemo.models.megatron.model.forward import batch_logprobs, hidden_states
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable, score
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenBatch, TokenRows
from tawin_nemo.util.errors import ConfigError

QWEN = Backbone("qwen2", 32, 2, 4, 2, 48, 51, rope_theta=1e4, max_position=64, init_std=0.2)
SHAPES = {
    "qwen2": QWEN,
    "llama, own head, as many keys as queries": replace(QWEN, family="llama", kv_heads=4, tied=False),
    "qwen3, wide heads": replace(QWEN, family="qwen3", head_dim=16),
}
ALL = LoraConfig(rank=3, alpha=5.0)
LORAS = {
    "all": ALL,
    "q and v": replace(ALL, target_modules=["v_proj", "q_proj"]),
    "k alone": replace(ALL, target_modules=["k_proj"]),
    "up and o": replace(ALL, target_modules=["up_proj", "o_proj"]),
    "gate and down": replace(ALL, target_modules=["gate_proj", "down_proj"]),
}
#: float64 sums in another order.
FLOAT64 = 1e-12
#: float32 products of merged weights against products with the factors.
FLOAT32 = 1e-5


def batch() -> TokenBatch:
    """Three prompts with answers of two tokens; log-probs over the whole vocabulary."""
    draw = torch.randint(0, QWEN.vocab, (3, 8), generator=torch.Generator().manual_seed(4)).numpy()
    first, answers = TokenRows.from_lists(list(draw[:, :6])), TokenRows.from_lists(list(draw[:, 6:]))
    return tree_batch(first, answers, np.arange(3), None)[0]


def plain(shape: Backbone, dtype: torch.dtype = torch.float64, **model: str) -> HiddenGPT:
    cfg = ModelConfig(**model)  # type: ignore[arg-type]
    runtime.initialize(cfg, seed=1)
    return build_model(shape, cfg, seed=3).to(dtype)


def adapted(shape: Backbone, lora: LoraConfig, dtype: torch.dtype = torch.float64, **model: str) -> HiddenGPT:
    """A model with adapters whose output factors are not 0."""
    result = plain(shape, dtype, **model)
    add_adapters(result, shape, lora, seed=5, base={})
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name.endswith("lora.b"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return result


def logprobs(model: HiddenGPT, rows: TokenBatch | None = None) -> Tensor:
    rows = batch() if rows is None else rows
    return batch_logprobs(model, rows, hidden_states(model, rows))


def matrices(model: HiddenGPT, shape: Backbone) -> dict[str, tuple[Tensor, list[int]]]:
    """Hugging Face name of a decoder's matrix -> the fused megatron weight that holds it, and its rows there."""
    found: dict[str, tuple[Tensor, list[int]]] = {}
    for (entry, layer), parameter in local_parameters(model, shape).items():
        if layer is None or parameter.dim() == 1:
            continue
        rows: dict[int, list[int]] = {}
        offset = 0
        for segment in shard_segments(entry, shape, 0, 1, padded_vocab=shape.vocab):
            count = parameter.shape[0] if entry.axis else segment.stop - segment.start
            rows.setdefault(segment.source, []).extend(range(offset, offset + count))
            offset += count
        for source, name in enumerate(hf_names(entry, layer)):
            found[name] = parameter, rows[source]
    return found


def factors(model: HiddenGPT, shape: Backbone, lora: LoraConfig) -> dict[str, tuple[Tensor, Tensor, slice, list[int]]]:
    """Hugging Face name of every adapted matrix -> both factors of the fused layer, and the rows of A and of B that
    belong to the matrix."""
    named = dict(model.named_parameters())
    owners = {id(parameter): name.removesuffix("weight") for name, parameter in named.items()}
    result = {}
    for weight_name, (parameter, rows) in matrices(model, shape).items():
        short = weight_name.split(".")[-2]
        if short not in lora.target_modules:
            continue
        fused = {"q": "qkv", "k": "qkv", "v": "qkv", "g": "gu", "u": "gu"}.get(short[0], short)
        order = {"qkv": ["q_proj", "k_proj", "v_proj"], "gu": ["gate_proj", "up_proj"]}.get(fused, [short])
        place = [name for name in order if name in lora.target_modules].index(short)
        a, b = named[f"{owners[id(parameter)]}lora.a"], named[f"{owners[id(parameter)]}lora.b"]
        result[weight_name] = a, b, slice(place * lora.rank, (place + 1) * lora.rank), rows
    return result


@pytest.mark.parametrize(
    ("name", "lora"), [*((n, "all") for n in SHAPES), *(("qwen2", n) for n in LORAS if n != "all")]
)
def test_log_probs_and_gradients_are_those_of_the_dense_model_with_merged_weights(name: str, lora: str) -> None:
    """y = (W + alpha / rank * B A) x by matrix of Hugging Face; dA = scale B' dW, dB = scale dW A'."""
    shape, cfg = SHAPES[name], LORAS[lora]
    model, dense, scale = adapted(shape, cfg), plain(shape), cfg.alpha / cfg.rank
    parts, whole = factors(model, shape, cfg), matrices(dense, shape)
    assert {key.split(".")[-2] for key in parts} == set(cfg.target_modules)
    with torch.no_grad():
        for key, (a, b, span, rows) in parts.items():
            whole[key][0][rows] += scale * b[rows] @ a[span]
    ours, theirs = logprobs(model), logprobs(dense)
    assert not torch.allclose(theirs, logprobs(plain(shape)), atol=1e-2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT64)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for key, (a, b, span, rows) in parts.items():
        grad = whole[key][0].grad[rows]  # type: ignore[index]
        assert grad.abs().max() > 1e-4, key
        torch.testing.assert_close(a.grad[span], scale * b[rows].T @ grad, rtol=0, atol=FLOAT64, msg=key)
        torch.testing.assert_close(b.grad[rows], scale * grad @ a[span].T, rtol=0, atol=FLOAT64, msg=key)
    trained = {id(x) for a, b, *_ in parts.values() for x in (a, b)}
    assert all((id(p) in trained) == p.requires_grad == (p.grad is not None) for p in model.parameters())


def test_they_add_nothing_at_first_and_nothing_when_they_are_off() -> None:
    fresh = plain(QWEN, torch.float32)
    add_adapters(fresh, QWEN, ALL, seed=5, base={})
    expected = logprobs(plain(QWEN, torch.float32))
    assert torch.equal(logprobs(fresh), expected)
    model = adapted(QWEN, ALL, torch.float32)
    on = logprobs(model)
    assert not torch.allclose(on, expected, atol=1e-2)
    with without_adapters(model):
        assert torch.equal(logprobs(model), expected)
        with pytest.raises(RuntimeError, match="stop"), without_adapters(model):
            raise RuntimeError("stop")
        assert torch.equal(logprobs(model), expected)
    assert torch.equal(logprobs(model), on)


def test_initial_factors_depend_on_seed_and_matrix_alone() -> None:
    """Normal(0, 1 / (3 inputs)), the variance of PEFT's initial A; other targets do not move them."""
    model = plain(replace(QWEN, hidden=512, heads=8, layers=1), torch.float32)
    shape = replace(QWEN, hidden=512, heads=8, layers=1)
    add_adapters(model, shape, replace(ALL, rank=16), seed=5, base={})
    a = model.decoder.layers[0].self_attention.linear_qkv.lora.a
    assert a.shape == (48, 512)
    assert float(a.std()) == pytest.approx((3 * 512) ** -0.5, rel=0.02)
    other = plain(shape, torch.float32)
    add_adapters(other, shape, replace(ALL, rank=16, target_modules=["v_proj"]), seed=5, base={})
    assert torch.equal(other.decoder.layers[0].self_attention.linear_qkv.lora.a, a[32:])
    assert not hasattr(other.decoder.layers[0].mlp.linear_fc1, "lora")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_models_and_exported_weights_compute_the_same(precision: str) -> None:
    dtype, tolerance = (torch.float32, FLOAT32) if precision == "fp32" else (torch.bfloat16, 0.25)
    model = adapted(QWEN, ALL, dtype, precision=precision)
    before, gathered = logprobs(model).detach(), gather_hf(model, QWEN)
    names = [name for name, _ in plain(QWEN, dtype, precision=precision).named_parameters()]
    fold(model)
    folded = logprobs(model).detach()
    merge(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.adapters is None
    assert torch.equal(logprobs(model), folded)
    torch.testing.assert_close(folded, before, rtol=0, atol=tolerance)
    assert gathered is not None
    for name, value in (gather_hf(model, QWEN) or {}).items():
        assert torch.equal(gathered[name], value), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_search_runs_the_same_adapters_bit_for_bit(name: str, precision: str) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = adapted(
        SHAPES[name], replace(ALL, target_modules=["q_proj", "o_proj", "up_proj"]), dtype, precision=precision
    )
    assert inference_forward.supported(model)

    def searched(*, fast: bool) -> Tensor:
        lm = MegatronLM(model, SHAPES[name], use_inference_forward=fast)
        cache = lm.prefill(TokenRows.from_lists([[3, 9, 27, 4], [1, 2], [7]]))
        cache = lm.extend(cache, torch.tensor([0, 2, 1]), TokenRows.from_lists([[5], [6, 8], [11]]))
        assert cache.hidden_RD is not None
        return cache.hidden_RD

    fast = searched(fast=True)
    assert torch.equal(fast, searched(fast=False))
    with without_adapters(model):
        assert not torch.equal(searched(fast=True), fast)
        assert torch.equal(searched(fast=True), searched(fast=False))


def trained(recompute: str = "none", dropout: float = 0.0) -> tuple[Trainable, list[dict[str, float]]]:
    model = plain(QWEN, torch.float32, recompute=recompute)
    add_adapters(model, QWEN, ALL, seed=5, base={}, dropout=dropout)
    actor = Trainable(model, QWEN, TrainerConfig(), lr=1e-2)
    stats = []
    for step in range(3):
        runtime.seed_step(0, step)
        stats.append(actor.update([MicroBatch(batch(), lambda logp_N: (-logp_N.mean(), {}))], lr=1e-2))
    return actor, stats


def test_training_keeps_every_bit_of_the_frozen_weights_and_no_state_for_them() -> None:
    before = dict(plain(QWEN, torch.float32).named_parameters())
    actor, stats = trained()
    assert stats[0]["loss"] > stats[1]["loss"] > stats[2]["loss"]
    after = dict(actor.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    added = {name: value for name, value in after.items() if name not in before}
    assert all(".lora." in name and value.requires_grad for name, value in added.items())
    owned = [p for group in actor.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in owned) == sum(value.numel() for value in added.values())
    assert not any(hasattr(after[name], "main_grad") for name in before)


def test_full_recomputation_gives_the_same_gradients() -> None:
    """The embedding is frozen: without care megatron's recomputed layers would get no gradient at all."""
    (_, stats), (_, expected) = trained("full"), trained()
    assert expected[0]["grad_norm"] > 1e-3
    for have, want in zip(stats, expected, strict=True):
        assert have == pytest.approx(want, rel=1e-6)


def test_dropout_is_of_the_adapters_in_training_alone() -> None:
    (dropped, stats), (_, expected) = trained(dropout=0.5), trained()
    assert stats[0]["loss"] == expected[0]["loss"]  # they add nothing yet
    assert stats[2]["loss"] != expected[2]["loss"]
    assert torch.equal(*(score(dropped.model, [batch()])[0] for _ in range(2)))


def test_a_rank_above_the_smaller_side_of_a_matrix_is_refused() -> None:
    cfg = ModelConfig(lora=LoraConfig(rank=17))
    runtime.initialize(cfg, seed=1)
    with pytest.raises(ConfigError, match=r"model\.lora\.rank=17 .* of k_proj, which is 16 .* to 16 or less"):
        build_model(QWEN, cfg, seed=3)
    build_model(QWEN, replace(cfg, lora=LoraConfig(rank=17, target_modules=["q_proj", "up_proj"])), seed=3)
