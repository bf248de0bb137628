"""What a rank that only searches does from its start to its end: one question of the training ranks after the other.

It reads no data and writes no file but its log: recipe, catalog, weights and prompts come from the training ranks.
An error ends it, and with it the job, whose launcher shows its traceback.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from tawin_nemo.config.backbones import FlopCount
from tawin_nemo.models.megatron.parallel import disaggregated, runtime
from tawin_nemo.placement.dispatch import dispatched, dispatched_search
from tawin_nemo.placement.remote_engine import (
    Build,
    CheckEqual,
    Found,
    Generate,
    ReceiveWeights,
    Search,
    Stop,
    WeightsAre,
)
from tawin_nemo.placement.weight_sync import check_equal, engine_with_own_model
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.run import signals
from tawin_nemo.run.failures import LogInto, logging_into
from tawin_nemo.types import DataParallel, moved
from tawin_nemo.util import failpoints
from tawin_nemo.util.errors import TawinError


def serve() -> None:
    """Answer until the training ranks say ``Stop``.

    SIGTERM and SIGUSR1 are only noted: the training ranks get them too, and end both sides when they have saved.
    """
    line = disaggregated.line()
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.listening())
        engine: RolloutEngine | None = None
        while not isinstance(message := line.receive(), Stop):
            if isinstance(message, LogInto):
                stack.enter_context(logging_into(message))
            elif isinstance(message, Build):
                engine = None  # its memory first
                engine, model = engine_with_own_model(message.recipe, None, message.shape, message.catalog)
                runtime.gather_objects(place(model))
            else:
                assert engine is not None, message
                _answer(line, engine, message)


def _answer(line: disaggregated.Line, engine: RolloutEngine, message: object) -> None:
    if isinstance(message, ReceiveWeights):
        engine.receive_weights()
    elif isinstance(message, WeightsAre):
        engine.weight_version = message.version
    elif isinstance(message, CheckEqual):
        with contextlib.suppress(TawinError):  # the training ranks raise the same one
            check_equal(engine)
    elif isinstance(message, Generate):
        failpoints.reach("rollout_rank.asked")
        assert engine.dp is not None
        generate = partial(engine.generate, **message.options)
        rollout = dispatched(generate, message.prompts, DataParallel(), engine.dp)
        line.answer(Found(rollout.to("cpu"), work_of_all(engine)))
    elif isinstance(message, Search):
        found = dispatched_search(engine, message.prompts, message.width, message.token_budget)
        line.answer(Found(moved(found, "cpu"), work_of_all(engine)))
    else:
        raise TypeError(f"the rollout ranks do not understand {message}")


def work_of_all(engine: RolloutEngine) -> FlopCount:
    """What the replicas ran since the last time, together."""
    assert engine.dp is not None
    return sum(engine.dp.gather(engine.pop_flops()), FlopCount())


def place(model: GPTModel) -> dict[str, Any]:
    """This rank's entry in layout.json."""
    groups, device = model.pg_collection, runtime.device()
    return {
        "rank": runtime.world_rank(),
        "world_size": runtime.world_size(),
        **{f"{name}_rank": getattr(groups, name).rank() for name in ("tp", "pp", "dp")},
        **{f"{name}_size": getattr(groups, name).size() for name in ("tp", "pp", "dp")},
        "role": "rollout",
        "layers": len(model.decoder.layers),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
