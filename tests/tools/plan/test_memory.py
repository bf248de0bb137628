"""The memory model against a built model: parameters exactly, and every byte that autograd saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from tawin_nemo.config.backbones import BACKBONES, Backbone, backbone
from tawin_nemo.config.layout import Layout, padded_vocab
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import ModelConfig, Recipe, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.decode.kv_store import KeyValueSlots
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.forward import hidden_states, modes
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.tools.plan.memory import (
    CONTEXT_BYTES,
    micro_batches,
    peaks,
    resident,
    search_parts,
    stage_parameters,
    swap_bytes,
    update_parts,
)  # fmt: skip
from tawin_nemo.tools.plan.work import (
    EDGES_AT_ONCE,
    LOGITS_ALIVE,
    LOGITS_KEPT,
    NARROWEST_SLICE,
    TITLES,
    Lengths,
    Numbers,
    Pass,
    backward_bytes,
    layer_bytes,
    saved_bytes,
)  # fmt: skip
from tawin_nemo.types import TokenBatch, TokenRows

SHAPE = Backbone(
    "qwen2", hidden=96, layers=2, heads=6, kv_heads=2, ffn=208, vocab=331, head_dim=16, rope_theta=1e4,
    max_position=4096,
)  # fmt: skip
PROMPTS, LENGTH, CANDIDATES, PATH = 3, 40, 3, 9
UNTIED = replace(SHAPE, tied=False)
QWEN3 = replace(SHAPE, family="qwen3", head_dim=32)
ONE = Layout()


def initialise() -> None:
    runtime.initialize(ModelConfig(), seed=1)


# -- parameters ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "shape",
    [SHAPE, UNTIED, replace(SHAPE, family="llama"), QWEN3, replace(SHAPE, family="mistral")],
    ids=["tied", "untied", "llama", "qwen3", "mistral"],
)
def test_parameters_are_those_of_the_built_model(shape: Backbone):
    initialise()
    model = build_model(shape, ModelConfig(), seed=1)
    assert stage_parameters(shape, ONE, 0) == sum(p.numel() for p in model.parameters())


def test_published_parameter_counts():
    """The counts that the models' cards give."""
    assert stage_parameters(backbone("qwen2.5-7b"), ONE, 0) == 7_615_616_512
    assert stage_parameters(backbone("qwen2.5-0.5b"), ONE, 0) == 494_032_768
    assert stage_parameters(backbone("llama-3.2-1b"), ONE, 0) == 1_235_814_400
    assert stage_parameters(backbone("qwen3-0.6b"), ONE, 0) == 596_049_920
    assert stage_parameters(backbone("qwen3-1.7b"), ONE, 0) == 1_720_574_976
    assert stage_parameters(backbone("qwen3-4b"), ONE, 0) == 4_022_468_096
    assert stage_parameters(backbone("qwen3-8b"), ONE, 0) == 8_190_735_360
    assert stage_parameters(backbone("mistral-7b"), ONE, 0) == 7_248_023_552
    assert stage_parameters(backbone("llama-2-7b"), ONE, 0) == 6_738_415_616


@pytest.mark.parametrize("shape", [BACKBONES["qwen2.5-7b"], BACKBONES["qwen2.5-0.5b"], BACKBONES["qwen3-4b"]])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (2, 4)])
def test_ranks_hold_the_whole_model_and_what_is_replicated(shape: Backbone, tp: int, pp: int):
    held = sum(tp * stage_parameters(shape, Layout(tp, pp), stage) for stage in range(pp))
    norms = (2 * shape.layers + 1) * shape.hidden + (2 * shape.layers * shape.kv_channels if shape.qk_norm else 0)
    padding = (padded_vocab(shape, tp) - shape.vocab) * shape.hidden * (1 if shape.tied else 2)
    second_head = padded_vocab(shape, tp) * shape.hidden if shape.tied and pp > 1 else 0
    assert held == stage_parameters(shape, ONE, 0) + (tp - 1) * norms + padding + second_head


# -- what stays ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("precision", "wide"), [("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False)])
def test_weights_gradients_and_optimizer_are_what_is_allocated(precision: str, wide: bool):
    """Storage of the parameters and of megatron's buffers and optimizer after a step, each counted once."""
    initialise()
    cfg = ModelConfig(precision=precision)
    trainer = TrainerConfig(grad_reduce_in_fp32=wide)
    trainable = Trainable(build_model(SHAPE, cfg, seed=1), SHAPE, trainer, lr=1e-3)
    trainable.update([], lr=1e-3)
    modelled = resident(SHAPE, Recipe(model=cfg, trainer=trainer), ONE, Numbers.of(precision, device="cpu"), 0)
    weights = storages(p.data for p in trainable.model.parameters())
    gradients = storages(p.main_grad for p in trainable.model.parameters())
    gradients |= storages(p.grad for group in trainable.optimizer.param_groups for p in group["params"])
    masters = storages(p.data for group in trainable.optimizer.param_groups for p in group["params"])
    states = storages(
        value
        for part in getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
        for state in part.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    )
    own = {key: size for key, size in {**masters, **states}.items() if key not in weights}
    for found, expected in ((weights, modelled.weights), (gradients, modelled.gradients), (own, modelled.optimizer)):
        assert sum(found.values()) == pytest.approx(expected, rel=0.01)  # buffers are padded


def storages(tensors: Iterator[torch.Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_shards_precision_and_context():
    recipe = load_recipe(None, ["trainer.distributed_optimizer=true"])
    numbers = Numbers.of("bf16")
    alone, shared = (resident(SHAPE, recipe, Layout(dp=dp), numbers, 0) for dp in (1, 4))
    assert shared.optimizer == alone.optimizer / 4
    assert (shared.weights, shared.gradients) == (alone.weights, alone.gradients)
    assert alone.context == CONTEXT_BYTES
    whole = load_recipe(None, ["trainer.distributed_optimizer=false"])
    assert resident(SHAPE, whole, Layout(dp=4), numbers, 0).optimizer == alone.optimizer


# -- activations -----------------------------------------------------------------------------------------------------
def batch(kind: str) -> tuple[TokenBatch, Pass]:
    """Equal prompts with trees of candidates that share nothing, or with one answer each."""
    draw = np.random.default_rng(0)
    prompts = TokenRows.from_lists([draw.integers(1, SHAPE.vocab, LENGTH) for _ in range(PROMPTS)])
    each = CANDIDATES if kind == "trees" else 1
    paths = [[2 + c, *draw.integers(1, SHAPE.vocab, PATH - 1)] for _ in range(PROMPTS) for c in range(each)]
    made, _ = tree_batch(prompts, TokenRows.from_lists(paths), np.repeat(np.arange(PROMPTS), each), None)
    tree = each * (PATH - 1) if kind == "trees" else 0
    keys = LENGTH + each * (PATH - 1)
    assert (len(made.tokens_S), int(made.tree_B.sum())) == (PROMPTS * keys, PROMPTS * tree)
    return made, Pass(PROMPTS * keys, PROMPTS * tree, keys)


def saved_by_autograd(cfg: ModelConfig, tokens: TokenBatch, shape: Backbone = SHAPE) -> int:
    """Bytes of the storages that autograd keeps after the forward pass; weights and index tensors are left out."""
    initialise()
    model = build_model(shape, cfg, seed=1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in weights and tensor.is_floating_point():
            kept[key] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), modes(model, training=True):
        hidden_states(model, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", ["chains", "trees"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [SHAPE, QWEN3], ids=["qwen2", "qwen3"])
def test_activations_are_what_autograd_saves(precision: str, kind: str, shape: Backbone):
    """To 1 %: the rotary angles and a boolean mask are all that differs."""
    tokens, work = batch(kind)
    numbers = Numbers.of(precision, device="cpu")
    modelled = saved_bytes(shape, ONE, numbers, work, recompute="none", layers=shape.layers, last=True)
    modelled -= work.tree * work.keys  # the boolean mask: the plan holds it, autograd does not
    assert modelled == pytest.approx(saved_by_autograd(ModelConfig(precision=precision), tokens, shape), rel=0.01)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_keeps_what_the_model_says(recompute: str):
    tokens, work = batch("chains")
    numbers = Numbers.of("fp32", device="cpu")
    modelled = saved_bytes(SHAPE, ONE, numbers, work, recompute=recompute, layers=SHAPE.layers, last=True)
    assert modelled == pytest.approx(saved_by_autograd(ModelConfig(recompute=recompute), tokens), rel=0.06)


def test_parallel_layouts_divide_activations():
    work, numbers = Pass(1000), Numbers.of("bf16")
    whole, split = (layer_bytes(SHAPE, Layout(tp), numbers, work) for tp in (1, 2))
    sequence = layer_bytes(SHAPE, Layout(2, sequence_parallel=True), numbers, work)
    assert whole / 2 < sequence < split < whole
    assert 1.7 < whole / sequence < 2.0  # all but cosines and sines
    assert backward_bytes(SHAPE, ONE, numbers, work, "full") > backward_bytes(SHAPE, ONE, numbers, work)


def test_full_recomputation_keeps_one_row_per_layer_and_runs_one_layer_again():
    work, numbers = Pass(1000), Numbers.of("bf16")
    assert layer_bytes(SHAPE, ONE, numbers, work, "full") == 1000 * SHAPE.hidden * 2


def test_the_first_stage_of_a_pipeline_holds_most_micro_batches():
    layout, numbers, work = Layout(pp=2), Numbers.of("bf16"), Pass(1000)
    first, last = (
        update_parts(SHAPE, layout, numbers, work, recompute="none", stage=stage, micro_batches=8) for stage in (0, 1)
    )
    alone = update_parts(SHAPE, layout, numbers, work, recompute="none", stage=0, micro_batches=1)
    assert first.activations == 2 * alone.activations
    assert (first.logits, last.logits > 0) == (0.0, True)


# -- search ----------------------------------------------------------------------------------------------------------
def test_the_key_value_cache_is_what_the_store_allocates():
    lengths, prompts, width = Lengths(20, 5, 4), 6, 3
    room = lengths.prompt + width * 4
    store = KeyValueSlots(prompts, room)
    for layer in range(SHAPE.layers):
        pair_S2GD = torch.zeros(1, 2, SHAPE.kv_heads, SHAPE.kv_channels)
        store.write(layer, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), pair_S2GD)
    held = sum(tensor.untyped_storage().nbytes() for tensor in store.tensors())
    parts = search_parts(
        SHAPE, ONE, Numbers.of("fp32"), lengths, budget=prompts * room, width=width, space="trie", stage=0
    )
    assert parts.kv_cache == held


def test_head_constants_are_those_of_the_head():
    from tawin_nemo.models.megatron.model import head

    assert (head._EDGES_AT_ONCE, head._KEPT_EXPONENTIALS, head._MIN_SLICE) == (
        EDGES_AT_ONCE,
        LOGITS_KEPT,
        NARROWEST_SLICE,
    )
    assert head._LIVE_LOGITS == LOGITS_ALIVE


# -- phases ----------------------------------------------------------------------------------------------------------
def test_phases_and_reference():
    overrides = ["model.backbone=qwen2.5-0.5b", "model.precision=bf16", "rl.beta=0.01"]
    shape = backbone("qwen2.5-0.5b")
    copied = {peak.phase: peak for peak in peaks(shape, load_recipe(None, overrides), ONE, TITLES)}
    assert list(copied) == ["SFT update", "RL update", "rollout", "evaluation"]
    assert copied["SFT update"].parts.reference == 0.0
    assert copied["rollout"].parts.reference == copied["rollout"].parts.weights > 0
    recipe = load_recipe(None, [*overrides, "reference.mode=swap"])
    swapped = {peak.phase: peak for peak in peaks(shape, recipe, ONE, TITLES)}
    assert swapped["rollout"].parts.reference == 0.0
    assert swap_bytes(shape, recipe, ONE) == 2 * stage_parameters(shape, ONE, 0)
    assert swap_bytes(shape, load_recipe(None, overrides), ONE) == 0.0


def test_the_total_is_the_sum_of_the_parts():
    for peak in peaks(backbone("qwen2.5-0.5b"), load_recipe(None), ONE, TITLES):
        assert peak.parts.total == sum(vars(peak.parts).values()) > 0


@pytest.mark.parametrize(("rows", "each", "budget", "expected"), [(8, 100, 400, 2), (9, 100, 400, 3), (3, 500, 400, 3)])
def test_micro_batches_hold_whole_rows(rows: int, each: int, budget: int, expected: int):
    assert micro_batches(rows, each, budget) == expected
