"""What every rank of a layout runs with and without overlapped communication: the same steps, compared bit for bit.

The steps cover what could leave a gradient unreduced or a weight stale: replicas with different numbers of
micro-batches, one without any, a step without gradient, one that is not finite, scoring and searches right after a
step, adapters, a head of its own, and a checkpoint that the other form continues.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.models.megatron.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tawin_nemo.models.megatron.checkpoint.flat_pieces import parameters, piece
from tawin_nemo.models.megatron.hf.memory import gather_hf
from tawin_nemo.models.megatron.model.adapters import add_adapters
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.util.errors import NonFiniteStep
from tests.distributed import late_gather
from tests.distributed.layout_worker import ROWS, SHAPE, decoded, loss, rows, total_positions
from tests.distributed.lora_worker import BASE, LORA

UNTIED = replace(SHAPE, family="llama", tied=False)
LR = 1e-2
#: The gradient norm of a distributed optimizer is summed over pieces that are cut at other places.
NORM_RELATIVE = 1e-6


@dataclass
class Trace:
    """What a run computed: statistics, whole gradients and weights by step, scores and logits in between."""

    stats: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    read: list[torch.Tensor] = field(default_factory=list)


def shares(space: str, *, last_has_none: bool = False, scale: float = 1.0) -> list[MicroBatch]:
    """This replica's rows, a micro-batch each on the first replica, together on the others."""
    place = runtime.data_parallel()
    replicas = place.size - 1 if last_has_none else place.size
    if place.rank >= replicas:
        return []
    mine = list(range(ROWS))[place.rank :: replicas]
    parts = [[row] for row in mine] if place.rank == 0 else [mine]
    return [MicroBatch(rows(part, space), partial(loss, total=total_positions(space) / scale)) for part in parts]


def whole_gradients(actor: Trainable) -> dict[str, torch.Tensor]:
    """Summed gradients of all parameters of this rank's shard; a distributed optimizer has only pieces of them."""
    names = {id(parameter): name for name, parameter in actor.model.named_parameters()}
    if not actor.ddp.ddp_config.use_distributed_optimizer:
        trained = [p for p in actor.model.parameters() if p.requires_grad]
        return {names[id(p)]: p.main_grad.clone() for p in trained}
    result: dict[str, torch.Tensor] = {}
    (optimizer,) = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    for parameter in parameters(optimizer):
        flat = torch.zeros(parameter.numel(), dtype=parameter.main_grad.dtype)
        owned = piece(optimizer, parameter)
        if owned is not None:
            flat[owned[0] : owned[1]] = parameter.main_grad.flatten()[owned[0] : owned[1]]
        dist.all_reduce(flat, group=actor.ddp.dp_group)
        result[names[id(parameter)]] = flat.view(parameter.shape)
    return result


def take(actor: Trainable, trace: Trace, micro: list[MicroBatch]) -> None:
    """One optimizer step, with its gradients."""
    trace.stats.append(actor.accumulate(micro))
    trace.gradients.append(whole_gradients(actor))
    trace.norms.append(actor.step(LR))


def new_actor(cfg: ModelConfig, trainer: TrainerConfig, kind: str) -> Trainable:
    shape = UNTIED if kind == "untied" else SHAPE
    model = build_model(shape, cfg, seed=3)
    if kind == "lora":
        add_adapters(model, shape, LORA, seed=5, base=BASE)
    return Trainable(model, shape, trainer, lr=LR)


def shared(actor: Trainable, cfg: ModelConfig) -> Any:
    """Another model with the same weights in the same memory."""
    twin = build_model(actor.shape, cfg, seed=4)
    weights = dict(actor.model.named_parameters())
    for name, parameter in twin.named_parameters():
        parameter.data = weights[name].data
    return SimpleNamespace(model=twin, shape=actor.shape)


def run(actor: Trainable, cfg: ModelConfig, kind: str, space: str) -> Trace:
    trace = Trace()
    trace.norms.append(actor.update_without_gradient(lr=LR))  # nothing has been counted yet
    take(actor, trace, shares(space))
    take(actor, trace, shares(space, last_has_none=True))
    trace.norms.append(actor.update_without_gradient(lr=LR))
    trace.norms.append(actor.update_without_gradient(lr=LR))
    trace.read += actor.score([rows([0, 4], space)])
    with pytest.raises(NonFiniteStep, match="gradient norm"):
        take(actor, trace, shares(space, scale=float("inf")))
    trace.gradients.pop()  # inf and NaN
    trace.stats.pop()
    trace.read += decoded(actor, use_inference_forward=True)
    take(actor, trace, shares(space))
    if runtime.data_parallel().rank == 0:  # a search on some replicas only
        trace.read += decoded(actor, use_inference_forward=False)
    take(actor, trace, shares(space, last_has_none=True))
    if kind != "lora":
        trace.read += decoded(shared(actor, cfg), use_inference_forward=True)
        trace.norms.append(actor.update_without_gradient(lr=LR))
    whole = gather_hf(actor.model, actor.shape)
    trace.weights.append(whole or {})
    take(actor, trace, shares(space))
    actor.score([])  # waits for nothing
    actor.score([rows([1], space)])
    trace.weights.append({name: p.detach().clone() for name, p in actor.model.named_parameters()})
    return trace


def assert_same(plain: Trace, overlapped: Trace, *, norms_differ: bool) -> None:
    assert overlapped.stats == plain.stats
    assert overlapped.norms == (pytest.approx(plain.norms, rel=NORM_RELATIVE) if norms_differ else plain.norms)
    for name in ("gradients", "weights"):
        ours, theirs = getattr(overlapped, name), getattr(plain, name)
        assert len(ours) == len(theirs)
        for step, (have, want) in enumerate(zip(ours, theirs, strict=True)):
            assert have.keys() == want.keys()
            for key, value in want.items():
                assert torch.equal(have[key], value), (name, step, key, (have[key] - value).abs().max())
    assert len(overlapped.read) == len(plain.read)
    assert all(torch.equal(have, want) for have, want in zip(overlapped.read, plain.read, strict=True))
    assert all(bool(value.isfinite().all()) for value in plain.read)
    assert plain.norms[1] > 0


def reductions_by_hook(actor: Trainable, space: str) -> int:
    """Bucket groups whose reduction had been started when the backward pass ended."""
    groups, seen = actor.ddp.bucket_groups, []
    finish = actor.ddp.finish_grad_sync

    def watched(*arguments: Any, **named: Any) -> None:
        seen.extend(group.grad_reduce_handle is not None for group in groups)
        finish(*arguments, **named)

    actor.ddp.finish_grad_sync = watched
    actor.accumulate(shares(space))
    actor.ddp.finish_grad_sync = finish
    assert len(seen) == len(groups)
    return sum(seen)


def compare(cfg: ModelConfig, distributed: bool, kind: str, space: str, folder: Path) -> None:
    plain = TrainerConfig(distributed_optimizer=distributed, clip_grad=0.0 if distributed else 1.0)
    overlapped = replace(plain, overlap_grad_reduce=True, overlap_param_gather=distributed)
    first, second = new_actor(cfg, plain, kind), new_actor(cfg, overlapped, kind)
    before = late_gather.started
    assert_same(run(first, cfg, kind, space), run(second, cfg, kind, space), norms_differ=distributed)
    groups = len(second.ddp.bucket_groups)
    assert first.ddp.ddp_config.overlap_grad_reduce is False
    assert second.ddp.ddp_config.overlap_grad_reduce is True
    assert groups > 2 or runtime.pp_size() > 1
    steps = 8 + (kind != "lora")  # the one that is not finite is not taken
    assert late_gather.started - before == (steps * groups if distributed else 0)
    assert reductions_by_hook(second, space) == groups
    if (kind, space) != ("tied", "vocab"):
        return
    for actor, name in ((first, "plain"), (second, "overlapped")):
        actor.update_without_gradient(lr=LR)  # the weights to be saved are under way
        save_checkpoint(folder / name / "step_9", model=actor.model, trainable=actor, state={"step": 9})
    for trainer, name in ((overlapped, "plain"), (plain, "overlapped")):
        other = new_actor(cfg, trainer, kind)
        load_checkpoint(folder / name / "step_9", model=other.model, trainable=other)
        trace, twin = Trace(), Trace()
        take(other, trace, shares(space))
        take(first if name == "plain" else second, twin, shares(space))
        other.score([rows([1], space)])
        trace.weights.append({name: p.detach().clone() for name, p in other.model.named_parameters()})
        mine = first if name == "plain" else second
        mine.score([rows([1], space)])
        twin.weights.append({name: p.detach().clone() for name, p in mine.model.named_parameters()})
        twin.norms.insert(0, 0.0)
        trace.norms.insert(0, 0.0)
        assert_same(twin, trace, norms_differ=distributed)


def main() -> None:
    options = json.loads(sys.argv[1])
    late_gather.install()
    cfg = ModelConfig(**options["model"])
    runtime.initialize(cfg, seed=1)
    for distributed in (True, False):
        for kind, space in (("tied", "vocab"), ("untied", "trie"), ("lora", "vocab")):
            folder = Path(sys.argv[2]) / str(distributed)
            compare(cfg, distributed, kind, space, folder)
    runtime.barrier()
    runtime.shutdown()


if __name__ == "__main__":
    main()
