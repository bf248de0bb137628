"""How far the candidates of rollouts depend on the number format that finds them (``rl/mismatch_beam_overlap``).

Training and rollouts may have different precisions (``rollout.precision``). ``mismatch_kl`` then says how far they
differ about the same candidates; this says whether they find the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from tawin_nemo.config.schema import RlConfig
from tawin_nemo.placement.dispatch import generate_options
from tawin_nemo.rollout.engine import Engine
from tawin_nemo.rollout.groups import found_in_both
from tawin_nemo.types import DataParallel, Rollout


@dataclass(frozen=True)
class PrecisionOverlap:
    """Compares rollouts with those of ``engine``, which has the actor's weights in another precision.

    ``interval``: steps from one comparison to the next; ``dp``: the replicas of training, which call it together.
    """

    engine: Engine
    rl: RlConfig
    dp: DataParallel
    interval: int

    def __call__(self, rollout: Rollout, step: int) -> dict[str, float]:
        """The share of the candidates of ``rollout``, which is on the CPU, that the other precision finds as well.

        Both make them alike: the same beams, or draws from the same seeds. Of a rollout that was searched ahead the
        step in between is part of the difference. Empty in the steps that are not compared.
        """
        if step % self.interval:
            return {}
        self.engine.receive_weights()
        other = self.engine.generate(rollout.prompts, **generate_options(self.rl, step)).to("cpu")
        counts = self.dp.gather(found_in_both(rollout, other))
        shared, candidates = (sum(column) for column in zip(*counts, strict=True))
        return {"rl/mismatch_beam_overlap": shared / max(1, candidates)}
