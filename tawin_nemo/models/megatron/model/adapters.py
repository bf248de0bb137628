"""A model's adapters (``lora.py``) as a whole: adding them, merging them into the weights, switching them off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.lora import MARK, MATRICES, ROW_PARALLEL, check_lora, targets
from tawin_nemo.config.schema import LoraConfig
from tawin_nemo.models.megatron.model.item_tokens import PREFIX
from tawin_nemo.models.megatron.model.lora import AdaptedColumn, AdaptedRow, LowRank
from tawin_nemo.util.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True)
class Adapters:
    """What the adapters of a model are (``lora``, without its dropout), and the frozen weights that they belong to.

    ``base`` is plain data (``train.base.Base``) that a checkpoint of the adapters stores and compares.
    """

    lora: LoraConfig
    base: Mapping[str, Any] = field(default_factory=dict)

    @property
    def signature(self) -> dict[str, Any]:
        """What two models must share to exchange adapters."""
        matrices = [name for linear in MATRICES for name in targets(linear, self.lora)]
        return {"rank": self.lora.rank, "alpha": self.lora.alpha, "target_modules": matrices}


def adapters_of(model: torch.nn.Module) -> Adapters | None:
    """The adapters of a model that ``add_adapters`` has been called for, else None."""
    found = getattr(model, "adapters", None)
    return found if isinstance(found, Adapters) else None


def add_adapters(
    model: GPTModel, shape: Backbone, lora: LoraConfig, *, seed: int, base: Mapping[str, Any], dropout: float = 0.0
) -> None:
    """Freeze a model of megatron's own linear layers and give it new adapters, which change no output yet.

    ``base`` names the frozen weights. Call it once the weights are loaded, before the optimizer is built. Raises
    ConfigError for the linear layers of Transformer Engine (FP8).
    """
    check_lora(shape, lora)
    model.requires_grad_(False)
    for layer in model.decoder.layers:
        for name, linear in _linears(layer):
            if not targets(name, lora):
                continue
            if not isinstance(linear, ColumnParallelLinear | RowParallelLinear):
                raise ConfigError(
                    f"adapters (model.lora) belong to weights of fp32 or bf16, but {name} is of FP8; set "
                    "model.precision and eval.precision to bf16"
                )
            linear.lora = LowRank(linear, name, shape, lora, dropout=dropout)
            linear.lora.draw(f"{layer.layer_number - 1}.{name}", seed)
            linear.__class__ = AdaptedRow if name in ROW_PARALLEL else AdaptedColumn
    model.adapters = Adapters(replace(lora, dropout=0.0), dict(base))
    if model.pre_process:
        recomputes = model.config.recompute_granularity == "full"
        model.embedding.register_forward_hook(lambda module, args, output: _prepared(output, recomputes=recomputes))


def _prepared(hidden_SBD: Tensor, *, recomputes: bool) -> Tensor:
    """The embedding's output as frozen layers need it.

    torch multiplies a row of tokens with a frozen matrix token by token, unless the strides are those of one matrix:
    slower, and rounded differently from the search. megatron recomputes layers in a function of their input, which
    has no gradient at all unless that input has one.
    """
    if hidden_SBD.shape[1] == 1:
        hidden_SBD = hidden_SBD[:, 0].unsqueeze(1)
    if recomputes and torch.is_grad_enabled() and not hidden_SBD.requires_grad:
        hidden_SBD.requires_grad_()
    return hidden_SBD


@torch.no_grad()
def fold(model: GPTModel) -> None:
    """Add the adapters to the weights, rounded to the weights' format, and set B to 0: they then add nothing."""
    for linear in adapted(model):
        linear.weight.copy_(merged_weight(linear))
        linear.lora.b.zero_()


def merge(model: GPTModel) -> None:
    """``fold``, then remove the adapters: a plain model with the same outputs up to rounding."""
    fold(model)
    for linear in adapted(model):
        linear.__class__ = RowParallelLinear if linear.lora.row_parallel else ColumnParallelLinear
        del linear.lora
    model.adapters = None


@torch.no_grad()
def merged_weight(linear: Any) -> Tensor:
    """This rank's weight of an adapted layer with its adapters, in the format of the weight."""
    added = linear.lora.product()
    return (linear.weight.to(added.dtype) + added).to(linear.weight.dtype)


class MergedShards(Mapping[Any, Tensor]):
    """``shards`` of a model's parameters, where an adapted weight is merged when it is read: one copy at a time."""

    def __init__(self, model: GPTModel, shards: Mapping[Any, Tensor]) -> None:
        self._shards, self._linears = shards, {id(linear.weight): linear for linear in adapted(model)}

    def __getitem__(self, key: Any) -> Tensor:
        shard = self._shards[key]
        linear = self._linears.get(id(shard))
        return shard if linear is None else merged_weight(linear)

    def __contains__(self, key: object) -> bool:
        return key in self._shards

    def __iter__(self) -> Iterator[Any]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


@contextlib.contextmanager
def without_adapters(model: GPTModel) -> Iterator[None]:
    """Inside, the model computes what its frozen weights alone give; nothing is copied."""
    layers = [linear.lora for linear in adapted(model)]
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = False
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def adapted(model: torch.nn.Module) -> list[Any]:
    """The linear layers of a model that have adapters."""
    return [module for module in model.modules() if isinstance(module, AdaptedColumn | AdaptedRow)]


def adapter_state(state: dict[str, Any]) -> dict[str, Any]:
    """The adapters' part of a state dictionary by parameter names, and the projection of ``model.item_tokens``: what
    SFT trains of a model whose other weights are frozen."""
    return {name: value for name, value in state.items() if MARK in name or name.startswith(PREFIX)}


def _linears(layer: Any) -> Iterator[tuple[str, Any]]:
    for name in MATRICES:
        yield name, getattr(layer.self_attention if hasattr(layer.self_attention, name) else layer.mlp, name)
