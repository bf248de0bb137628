"""Combinations of recipe keys of overlapped data-parallel communication that make no sense, each with the remedy."""

from __future__ import annotations

from collections.abc import Iterator

from tawin_nemo.config.schema import TrainerConfig


def overlap_combinations(t: TrainerConfig) -> Iterator[tuple[bool, str]]:
    """(is wrong, message) of every combination of ``trainer.overlap_*`` that makes no sense."""
    yield (
        t.overlap_param_gather and not t.distributed_optimizer,
        "trainer.overlap_param_gather=true but trainer.distributed_optimizer=false: every replica updates all weights, "
        "and there is nothing to gather; set trainer.distributed_optimizer=true or trainer.overlap_param_gather=false",
    )
    yield (
        t.overlap_param_gather and not t.overlap_grad_reduce,
        "trainer.overlap_param_gather=true but trainer.overlap_grad_reduce=false: the weights lie in one bucket then, "
        "which the first layer waits for; set both to true, or both to false",
    )
