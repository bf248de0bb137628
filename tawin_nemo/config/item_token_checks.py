"""Combinations of ``model.item_tokens`` with other keys that make no sense, each with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Iterator

from tawin_nemo.config.schema import Recipe


def item_token_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    """(is wrong, message) of every combination of ``model.item_tokens`` that makes no sense."""
    m = r.model
    yield (
        r.sft.curriculum > 0 and not m.item_tokens,
        f"sft.curriculum={r.sft.curriculum:g} brings item tokens into prompts, but model.item_tokens is empty; name a "
        "finished baseline stage there, or set sft.curriculum=0",
    )
    if not m.item_tokens:
        return
    named = f"model.item_tokens={m.item_tokens}"
    yield (
        m.freeze_backbone,
        f"{named} trains a projection, but model.freeze_backbone=true trains rows of new tokens alone; set it to false",
    )
    yield (
        r.rollout.placement != "colocated",
        f"{named} works in the training processes only, not with rollout.placement={r.rollout.placement}; set "
        "rollout.placement=colocated",
    )
    yield (
        r.rollout_layout != (m.tensor_model_parallel_size, m.pipeline_model_parallel_size),
        f"{named} needs rollouts in the layout of training; set rollout.tensor_model_parallel_size=0 and "
        "rollout.pipeline_model_parallel_size=0",
    )
    yield (
        r.rollout.cuda_graphs == "on",
        f"{named} gives prompts of changing shapes to a captured graph; set rollout.cuda_graphs=off",
    )
