"""One rank of ``tests.benchmarks.checkpoint``: saves, resumes, and says what that cost it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.models.megatron.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tawin_nemo.models.megatron.checkpoint.sharded_state import complete_adam_state
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tests.benchmarks import harness
from tests.models.megatron.checkpoint import gathered


def state(actor: Trainable) -> list[torch.Tensor]:
    """The model's weights and what this rank owns of master weights and moments."""
    tensors = [parameter.detach() for parameter in actor.model.parameters()]
    for part in actor.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                values = part.optimizer.state[parameter]
                tensors += [parameter.detach(), values["exp_avg"], values["exp_avg_sq"]]
    return tensors


def digest(tensors: list[torch.Tensor]) -> str:
    """SHA-256 of the bits of all tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def actor(shape: Backbone) -> Trainable:
    """A model in bf16 with a state of random numbers, the same in every run."""
    cfg = ModelConfig(precision="bf16")
    made = Trainable(build_model(shape, cfg, seed=1), shape, TrainerConfig(), lr=1e-4)
    complete_adam_state(made.optimizer)
    generator = torch.Generator().manual_seed(7 + runtime.world_rank())
    weights = {parameter.data_ptr() for parameter in made.model.parameters()}
    for tensor in state(made):
        if tensor.data_ptr() not in weights:  # every rank has the same weights
            tensor.normal_(generator=generator)
    return made


def peak_above(run: Callable[[], Any]) -> float:
    """``harness.peak_above``, after what was freed before has gone back to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return harness.peak_above(run)


def main() -> None:
    side, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    runtime.initialize(ModelConfig(precision="bf16"), seed=1)
    torch.set_num_threads(1)
    made = actor(Backbone(**options["shape"]))
    saving, loading = (
        (gathered.saving, gathered.loading) if side == "gathered" else (contextlib.nullcontext, contextlib.nullcontext)
    )
    path, rank = folder / side / "step_1", runtime.world_rank()
    save = partial(save_checkpoint, path, model=made.model, trainable=made, state={})
    load = partial(load_checkpoint, model=made.model, trainable=made, verified=True)
    expected, equal = digest(state(made)), {}
    with saving():
        save_mib = peak_above(save)  # the first one, which warms up for the others
        runtime.barrier()
        save_seconds = [harness.seconds_of(save) for _ in range(options["repeats"])]
    written = (path / f"__{rank}_0.distcp").stat().st_size if (path / f"__{rank}_0.distcp").exists() else 0
    with loading():
        for tensor in state(made):
            tensor.zero_()
        runtime.barrier()
        load_mib = peak_above(partial(load, path))
        equal["own"] = digest(state(made)) == expected
        runtime.barrier()
        load_seconds = [harness.seconds_of(partial(load, path)) for _ in range(options["repeats"])]
    other = folder / "gathered" / "step_1"
    if side != "gathered" and other.is_dir():
        for tensor in state(made):
            tensor.zero_()
        equal["gathered"] = (load(other), digest(state(made)) == expected)[1]
    result = {"written": written, "save_mib": save_mib, "load_mib": load_mib, "save_seconds": save_seconds,
              "load_seconds": load_seconds, "equal": equal,
              "largest": max(tensor.numel() for tensor in made.model.parameters())}  # fmt: skip
    (folder / f"{side}.{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    runtime.barrier()
    runtime.shutdown()


if __name__ == "__main__":
    main()
