"""Number formats: padding that changes nothing, FP8's layers against megatron's own, refusals on made-up machines.

Nothing here computes in FP8: that needs a Hopper GPU (tests/gpu).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import BACKBONES, Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model import layer_spec, precision
from tawin_nemo.models.megatron.model.attention import PlannedAttention
from tawin_nemo.models.megatron.model.build import HiddenGPT, build_model, model_config
from tawin_nemo.models.megatron.model.layer_spec import RMSNorm
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenBatch, TokenRows

SHAPE = Backbone("qwen2", hidden=64, layers=3, heads=4, kv_heads=2, ffn=96, vocab=51, rope_theta=1e4, max_position=256)
FP8 = ("fp8-blockwise", "fp8-tensorwise", "fp8-delayed")
HOPPER = precision.Machine((9, 0), "NVIDIA H800", "13.0", "2.10.0")
#: More rows may make a library choose another kernel, which sums in another order: one rounding of float32 or bf16 in
#: the largest entry, here and there. (0 on the processor this was written on.)
TOLERANCE = {"fp32": 1e-6, "bf16": 2**-7}


@pytest.fixture(autouse=True)
def _one_process() -> None:
    runtime.initialize(ModelConfig(), seed=1)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has everything, with megatron's own linear layers in the places of Transformer Engine's."""
    monkeypatch.setattr(precision, "this_machine", lambda: HOPPER)
    monkeypatch.setattr(layer_spec, "engine_layers", lambda: (Column, Row))


class _Multiples:
    """What Transformer Engine's linear layers insist on, in front of megatron's own arithmetic."""

    wanted = 16

    def forward(self, rows_SBD: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = rows_SBD.shape[0] * rows_SBD.shape[1]
        assert rows % self.wanted == 0, f"{rows} rows"
        assert rows_SBD.shape[-1] % 16 == 0
        return super().forward(rows_SBD)  # type: ignore[misc]


class Column(_Multiples, ColumnParallelLinear):
    pass


class Row(_Multiples, RowParallelLinear):
    pass


# -- padding -------------------------------------------------------------------------------------------------------
def task() -> tuple[TokenBatch, TokenTrie]:
    """Three prompts with trees of candidates, 37 tokens and more: no multiple of 16."""
    draw = np.random.default_rng(3)
    paths = sorted({(*draw.integers(2, 8, draw.integers(2, 5)).tolist(), 1) for _ in range(40)})
    trie = TokenTrie.from_paths([list(path) for path in paths])
    prompts = TokenRows.from_lists([draw.integers(2, 50, size).tolist() for size in (7, 12, 5)])
    answers = TokenRows.from_lists([list(paths[i]) for i in draw.integers(0, len(paths), 12)])
    return tree_batch(prompts, answers, np.repeat(np.arange(3), 4), None)[0], trie


def loss(logp_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (logp_N.float() * torch.linspace(-1.0, 2.0, len(logp_N))).sum(), {}


def padded_as(model: HiddenGPT, recipe: str | None) -> list[int]:
    """Make the model pad as this FP8 recipe does, and record how many rows its first linear layer sees."""
    if recipe is not None:  # without Transformer Engine megatron computes such a model in the format of its weights
        model.config.fp8, model.config.fp8_recipe = "e4m3", recipe
    seen: list[int] = []
    layer = model.decoder.layers[0].self_attention.linear_qkv
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0]))
    return seen


def one_pass(number_format: str, recipe: str | None) -> tuple[float, Tensor, dict[str, Tensor], list[int]]:
    """Loss, log-probs, gradients and rows of one training pass."""
    batch, _ = task()
    model = build_model(SHAPE, ModelConfig(precision=number_format), seed=3)
    seen = padded_as(model, recipe)
    trainable = Trainable(model, SHAPE, TrainerConfig(), lr=1e-3)
    stats = trainable.accumulate([MicroBatch(batch, loss)])
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    return stats["loss"], trainable.score([batch])[0], gradients, seen


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
@pytest.mark.parametrize(("recipe", "multiple"), [("tensorwise", 16), ("blockwise", 128)])
def test_padding_changes_neither_losses_nor_gradients(number_format: str, recipe: str, multiple: int) -> None:
    batch, _ = task()
    want_loss, want_logp, want, plain = one_pass(number_format, None)
    have_loss, have_logp, have, padded = one_pass(number_format, recipe)
    assert set(plain) == {len(batch.tokens_S)}  # the oracle has no padding
    assert all(rows % multiple == 0 for rows in padded)
    tolerance = TOLERANCE[number_format]
    torch.testing.assert_close(have_logp, want_logp, rtol=tolerance, atol=tolerance)
    assert have_loss == pytest.approx(want_loss, rel=10 * tolerance)
    for name, gradient in want.items():
        scale = float(gradient.abs().max())
        assert float((have[name] - gradient).abs().max()) <= tolerance * scale + 1e-12, name


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_a_search_is_padded_too_and_scores_the_same(number_format: str) -> None:
    prompts = TokenRows.from_lists([[5, 9, 3], [7, 2, 30, 31, 8]])
    chains = TokenRows.from_lists([[3, 4], [5], [6, 7, 8]])

    def scores(recipe: str | None, *, use_inference_forward: bool) -> tuple[Tensor, list[int]]:
        model = build_model(SHAPE, ModelConfig(precision=number_format), seed=3)
        seen = padded_as(model, recipe)
        lm = MegatronLM(model, SHAPE, use_inference_forward=use_inference_forward)
        cache = lm.extend(lm.prefill(prompts), torch.tensor([0, 0, 1]), chains)
        rows = torch.arange(lm.rows(cache))
        return lm.logprobs(
            cache, rows, rows.repeat_interleave(2), torch.tensor([4, 9]).repeat(len(rows)), "vocab"
        ), seen

    want, plain = scores(None, use_inference_forward=False)
    have, padded = scores("blockwise", use_inference_forward=False)
    assert plain == [8, 6]
    assert padded == [128, 128]
    torch.testing.assert_close(have, want, rtol=TOLERANCE[number_format], atol=TOLERANCE[number_format])
    assert torch.equal(scores("blockwise", use_inference_forward=True)[0], have)


@pytest.mark.parametrize(
    ("cfg", "multiple"),
    [
        (ModelConfig(precision="bf16"), 1),
        (ModelConfig(precision="bf16", tensor_model_parallel_size=2, sequence_parallel=True), 2),
        (ModelConfig(precision="fp8-delayed", tensor_model_parallel_size=2), 16),
        (ModelConfig(precision="fp8-tensorwise", tensor_model_parallel_size=2, sequence_parallel=True), 32),
        (ModelConfig(precision="fp8-blockwise"), 128),
        (ModelConfig(precision="fp8-blockwise", tensor_model_parallel_size=2, sequence_parallel=True), 256),
    ],
)
def test_every_ranks_share_of_the_tokens_is_a_multiple(cfg: ModelConfig, multiple: int, on_hopper: None) -> None:
    assert precision.row_multiple(model_config(BACKBONES["qwen2.5-0.5b"], cfg)) == multiple


# -- layers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FP8)
def test_an_fp8_model_has_the_parameters_of_a_bf16_model(name: str, on_hopper: None) -> None:
    fp8, bf16 = (build_model(SHAPE, ModelConfig(precision=p), seed=3) for p in (name, "bf16"))
    theirs = dict(bf16.named_parameters())
    assert [n for n, _ in fp8.named_parameters()] == list(theirs)
    assert all(torch.equal(p, theirs[n]) for n, p in fp8.named_parameters())
    for layer in fp8.decoder.layers:
        assert isinstance(layer.self_attention.core_attention, PlannedAttention)
        assert isinstance(layer.self_attention.linear_qkv, Column)
        assert isinstance(layer.self_attention.linear_proj, Row)
        assert isinstance(layer.mlp.linear_fc1, Column)
        assert isinstance(layer.mlp.linear_fc2, Row)
        assert isinstance(layer.input_layernorm, RMSNorm)
        assert isinstance(layer.pre_mlp_layernorm, RMSNorm)
    assert not isinstance(fp8.embedding.word_embeddings, _Multiples)


@pytest.mark.parametrize("name", FP8)
def test_every_pass_of_an_fp8_model_hands_its_layers_whole_blocks(
    name: str, on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, scoring and search: the stand-ins refuse other numbers of rows, as Transformer Engine's layers do.

    Not recomputation of whole layers, which megatron does with Transformer Engine's own code under FP8.
    """
    monkeypatch.setattr(_Multiples, "wanted", precision.FP8[name].tokens)
    batch, _ = task()
    model = build_model(SHAPE, ModelConfig(precision=name), seed=3)
    trainable = Trainable(model, SHAPE, TrainerConfig(), lr=1e-3)
    assert trainable.update([MicroBatch(batch, loss)], lr=1e-3)["grad_norm"] > 0
    assert len(trainable.score([batch])[0]) == len(batch.row_N)
    lm = MegatronLM(model, SHAPE)
    cache = lm.extend(lm.prefill(TokenRows.from_lists([[5, 9, 3]])), torch.tensor([0]), TokenRows.from_lists([[3, 4]]))
    assert lm.rows(cache) == 3


def keywords(file: Path, of: str) -> set[str]:
    """Parameters of a class's constructor, read from the source: without Transformer Engine it is a mock."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == of)
    init = next(node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)}


@pytest.mark.parametrize(
    ("theirs", "ours"), [("TEColumnParallelLinear", ColumnParallelLinear), ("TERowParallelLinear", RowParallelLinear)]
)
def test_transformer_engines_layers_take_what_attention_and_mlp_pass(theirs: str, ours: type) -> None:
    spec = importlib.util.find_spec("megatron.core.extensions.transformer_engine")
    assert spec is not None
    assert spec.origin is not None
    passed: set[str] = set()
    for module in ("attention", "mlp"):
        source = importlib.util.find_spec(f"megatron.core.transformer.{module}")
        assert source is not None
        assert source.origin is not None
        for node in ast.walk(ast.parse(Path(source.origin).read_text(encoding="utf-8"))):
            names = {"TEColumnParallelLinear": ("linear_qkv", "linear_fc1"), "TERowParallelLinear": ("linear_proj",)}
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "build_module" and node.args:
                what = ast.unparse(node.args[0])
                if any(what == f"submodules.{name}" for name in names[theirs]):
                    passed |= {keyword.arg for keyword in node.keywords if keyword.arg}
    assert {"config", "init_method", "bias", "skip_bias_add"} <= passed
    accepted = keywords(Path(spec.origin), theirs)
    assert passed <= accepted
    assert passed <= set(inspect.signature(ours).parameters)


@pytest.mark.parametrize("name", FP8)
def test_megatron_accepts_what_it_is_told(name: str, on_hopper: None) -> None:
    cfg = ModelConfig(precision=name)
    if name != "fp8-delayed":
        cfg = replace(cfg, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2)
    config = model_config(SHAPE, cfg)
    assert Fp8Recipe(config.fp8_recipe).value == name.removeprefix("fp8-")
    assert config.params_dtype == torch.bfloat16
    assert config.first_last_layers_bf16 == (name != "fp8-delayed")
    assert config.disable_parameter_transpose_cache  # or a search would run the weights of the step before
    assert config.tp_only_amax_red  # or replicas with different numbers of passes would wait for each other


def test_first_and_last_layers_stay_bf16(on_hopper: None) -> None:
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    cfg = ModelConfig(precision="fp8-blockwise", num_layers_at_end_in_bf16=1)
    config = model_config(SHAPE, cfg)
    assert [is_first_last_bf16_layer(config, layer) for layer in range(SHAPE.layers)] == [False, False, True]
