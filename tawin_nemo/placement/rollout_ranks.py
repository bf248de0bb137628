"""The rollout side of disaggregated rollouts: a rollout rank handles the messages of the training ranks.

It reads no data and writes only its log file: recipe, catalog, weights and prompts come from the training ranks.
An error ends it, and with it the job, whose launcher shows its traceback.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from tawin_nemo.config.backbones import FlopCount
from tawin_nemo.models.megatron.model.build import model_summary
from tawin_nemo.models.megatron.parallel import disaggregated, runtime
from tawin_nemo.placement.dispatch import dispatch_rollout, dispatch_search
from tawin_nemo.placement.remote_engine import (
    MESSAGES,
    BuildEngine,
    CheckEqual,
    Generate,
    Generated,
    ReceiveWeights,
    Search,
    Searched,
    SetWeightVersion,
)
from tawin_nemo.placement.weight_sync import check_equal, engine_with_own_model
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.run import signals
from tawin_nemo.run.failures import OpenLog, logging_into
from tawin_nemo.types import DataParallel
from tawin_nemo.util.errors import TawinError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def serve() -> None:
    """Handle messages until the training ranks broadcast ``Stop``.

    SIGTERM and SIGUSR1 are ignored: the training ranks get them too, and stop the whole job when they have saved.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.listening())
        handler = _Handler(stack)
        disaggregated.rollout_channel().follow((OpenLog, *MESSAGES), handler)


class _Handler:
    """Executes messages; ``stack`` closes the log file when the rank ends."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack, self._channel = stack, disaggregated.rollout_channel()
        self._engine: RolloutEngine | None = None

    def __call__(self, message: object) -> None:
        if isinstance(message, OpenLog):
            self._stack.enter_context(logging_into(message))
        elif isinstance(message, BuildEngine):
            self._engine = None  # frees its memory before the next one is built
            self._engine, model = engine_with_own_model(message.recipe, None, message.shape, message.catalog)
            runtime.gather_objects(layout_entry(model))
        else:
            assert self._engine is not None, message
            self._with_engine(self._engine, message)

    def _with_engine(self, engine: RolloutEngine, message: object) -> None:
        if isinstance(message, ReceiveWeights):
            engine.receive_weights()
        elif isinstance(message, SetWeightVersion):
            engine.weight_version = message.version
        elif isinstance(message, CheckEqual):
            with contextlib.suppress(TawinError):  # the training ranks raise the same one
                check_equal(engine)
        elif isinstance(message, Generate):
            assert engine.dp is not None
            generate = partial(engine.generate, **message.options)
            rollout = dispatch_rollout(generate, message.prompts, DataParallel(), engine.dp)
            self._channel.respond(Generated(rollout.to("cpu"), flops_of_all(engine)))
        elif isinstance(message, Search):
            candidates = dispatch_search(engine, message.prompts, message.width, message.token_budget)
            self._channel.respond(Searched(candidates.to("cpu"), flops_of_all(engine)))
        else:
            raise TypeError(f"rollout ranks have no handler for {type(message).__name__}")


def flops_of_all(engine: RolloutEngine) -> FlopCount:
    """Floating-point work of all replicas since the last call, added up; every rollout rank calls it."""
    assert engine.dp is not None
    return sum(engine.dp.gather(engine.pop_flops()), FlopCount())


def layout_entry(model: GPTModel) -> dict[str, Any]:
    """This rank's entry in layout.json."""
    groups = model.pg_collection
    return {
        "rank": runtime.world_rank(),
        "world_size": runtime.world_size(),
        **{f"{name}_rank": getattr(groups, name).rank() for name in ("tp", "pp", "dp")},
        **{f"{name}_size": getattr(groups, name).size() for name in ("tp", "pp", "dp")},
        "role": "rollout",
        **model_summary(model),
    }
