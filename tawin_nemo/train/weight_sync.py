"""Give the rollout engine the actor's newest weights, and say which version they are.

Colocated rollouts with the training layout read the actor's own parameters: nothing is copied, only the version is
raised. The engine stamps every rollout with it, and the actor refuses a rollout of another version, so that stale
weights cannot go unnoticed.
"""

from __future__ import annotations

from tawin_nemo.errors import TawinError
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.types import Rollout


def sync_weights(engine: RolloutEngine, *, version: int) -> None:
    """Declare the shared weights to be ``version``. Raises TawinError when the version would go backwards."""
    if version < engine.weight_version:
        raise TawinError(f"weight version {version} is older than the rollout engine's {engine.weight_version}")
    engine.weight_version = version


def check_version(rollout: Rollout, expected: int) -> None:
    """Raises TawinError when a rollout was made with other weights than the actor's."""
    if rollout.weight_version != expected:
        raise TawinError(f"rollout of weight version {rollout.weight_version} reached an actor at version {expected}")
