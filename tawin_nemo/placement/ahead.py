"""One-step-ahead rollouts (``rollout.ahead: 1``): while step t updates the actor, the rollout of step t + 1 is made.

The rollout ranks use the weights of step t for it, one version older than those that learn from it, so every step but
the first is off-policy by one update. A rollout of any other version is rejected. The actor's ratio is computed against
the rollout's own log-probs, as for the second of several inner updates, and clipped or (``rl.importance_cap``)
truncated in the same way; recipes whose rollouts have no log-probs are rejected.

The pending rollout is part of a checkpoint: a run that was killed continues with the same candidates, whatever step it
was stopped at and under any layout.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch

from tawin_nemo.config.schema import RlConfig
from tawin_nemo.placement.dispatch import generate_options
from tawin_nemo.placement.remote_engine import RemoteEngine
from tawin_nemo.placement.weight_sync import check_version
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.run.timers import Timers
from tawin_nemo.types import DataParallel, PromptBatch, Rollout, TokenRows
from tawin_nemo.util.errors import CheckpointError, TawinError


class RolloutAhead:
    """The pending rollout of the next step, for the prompts of all replicas; without an ``engine`` there is none.

    ``total``: number of steps of the run. In timings.jsonl the phase ``generate`` is the time that a step waits for
    its rollout, not the time that the rollout takes.
    """

    def __init__(
        self, engine: Engine | None = None, rl: RlConfig | None = None, dp: DataParallel | None = None, total: int = 0
    ) -> None:
        self._engine, self._rl, self._dp, self._total = engine, rl or RlConfig(), dp or DataParallel(), total
        self._waiting: Rollout | None = None
        self._own_rows = torch.zeros(
            0, dtype=torch.long
        )  # row numbers of this replica's prompts in the pending rollout

    @contextmanager
    def searching(self, prompts: Callable[[], PromptBatch], timers: Timers, *, step: int) -> Iterator[None]:
        """Start the rollout of ``step`` with the present weights, and wait for it at the end of the block."""
        if self._engine is None or step >= self._total:
            yield
            return
        assert isinstance(self._engine, RemoteEngine)
        with timers("data"):
            own = prompts()
            everything = PromptBatch.cat(self._dp.gather(own))
        self._engine.begin(everything, **generate_options(self._rl, step))
        yield
        with timers("generate"):
            self._waiting, self._own_rows = self._engine.finish(), own.row_B

    def take(self, step: int) -> Rollout | None:
        """This replica's part of the pending rollout of ``step``; None when ``step`` has to make its own.

        Raises TawinError when it is missing, of a version other than ``step - 1``, or without log-probs.
        """
        if self._engine is None or step == 0:
            return None
        whole, self._waiting = self._waiting, None
        if whole is None:
            raise TawinError(f"rollout.ahead=1: nothing was searched ahead for step {step}")
        check_version(whole, expected=step - 1)
        if whole.logprobs_BGT is None or bool(whole.logprobs_BGT.isnan().any()):
            raise TawinError("rollout.ahead=1: a rollout without its own log-probs cannot be corrected for its age")
        index = {int(row): at for at, row in enumerate(whole.prompts.row_B)}
        return whole.take(torch.tensor([index[int(row)] for row in self._own_rows], dtype=torch.long))

    def staleness(self, rollout: Rollout, *, step: int) -> dict[str, float]:
        """``rl/staleness``: weight versions between the rollout and the update; empty without an engine."""
        return {} if self._engine is None else {"rl/staleness": float(step - rollout.weight_version)}

    def state(self) -> dict[str, Any]:
        """The pending rollout as JSON for a checkpoint; empty when there is none."""
        if self._waiting is None:
            return {}
        waiting = self._waiting
        tensors = {name: getattr(waiting, name) for name in _TENSORS} | {
            "row_B": waiting.prompts.row_B,
            "target_B": waiting.prompts.target_B,
            "flat": torch.from_numpy(waiting.prompts.prompts.flat),
            "offsets": torch.from_numpy(waiting.prompts.prompts.offsets),
        }
        data = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
        return {"rollout_ahead": base64.b64encode(data).decode(), "rollout_version": waiting.weight_version}

    def restore(self, state: dict[str, Any], own: PromptBatch) -> None:
        """Restore the pending rollout from ``state()``; ``own``: this replica's share of its prompts.

        Raises CheckpointError when the data now give other prompts.
        """
        if not state:
            return
        tensors = safetensors.torch.load(base64.b64decode(state["rollout_ahead"]))
        prompts = PromptBatch(
            tensors.pop("row_B"),
            TokenRows(tensors.pop("flat").numpy(), tensors.pop("offsets").numpy()),
            tensors.pop("target_B"),
        )
        if not set(own.row_B.tolist()) <= set(prompts.row_B.tolist()):
            raise CheckpointError(
                "the pending rollout in the checkpoint has other rows than the data now; restore the old data"
            )
        self._waiting = Rollout(prompts=prompts, weight_version=int(state["rollout_version"]), **tensors)
        self._own_rows = own.row_B


_TENSORS = ("items_BG", "tokens_BGT", "lengths_BG", "scores_BG", "logprobs_BGT", "is_target_BG")
