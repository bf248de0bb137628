"""Combinations of recipe keys about the model and its number formats that make no sense, each with the remedy."""

from __future__ import annotations

from collections.abc import Iterator

from tawin_nemo.config.item_token_checks import item_token_combinations
from tawin_nemo.config.lora_checks import lora_combinations
from tawin_nemo.config.schema import Recipe
from tawin_nemo.util.hub import is_hub_name


def precision_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    """(is wrong, message) of every combination about the model and its number formats that makes no sense."""
    m = r.model
    first, last = m.num_layers_at_start_in_bf16, m.num_layers_at_end_in_bf16
    yield (
        bool(m.revision) and not is_hub_name(m.init),
        f"model.revision={m.revision} belongs to a model of the hub, but model.init={m.init} is none (OWNER/NAME); "
        "clear model.revision",
    )
    yield (
        m.precision == "fp8-delayed" and first + last > 0,
        f"model.precision=fp8-delayed scales over the whole model, but model.num_layers_at_start_in_bf16={first} and "
        f"model.num_layers_at_end_in_bf16={last}; set both to 0, or use fp8-tensorwise or fp8-blockwise",
    )
    yield (
        r.rollout.precision == "fp8-delayed" and first + last > 0,
        f"rollout.precision=fp8-delayed scales over the whole model, but model.num_layers_at_start_in_bf16={first} and "
        f"model.num_layers_at_end_in_bf16={last}; set both to 0, or use fp8-tensorwise or fp8-blockwise",
    )
    yield (
        r.rollout.precision == "fp8-delayed" and m.precision != "fp8-delayed",
        "rollout.precision=fp8-delayed takes its scales from training passes, of which the model of rollouts has one; "
        f"model.precision={m.precision} trains another: set rollout.precision=fp8-tensorwise, fp8-blockwise or model",
    )
    yield from lora_combinations(r)
    yield from item_token_combinations(r)
    own = r.reference.precision
    yield (
        r.reference.mode == "swap" and own not in ("model", m.precision),
        f"reference.precision={own} but reference.mode=swap runs in the actor's model, which is {m.precision}; "
        "set reference.mode=copy or reference.precision=model",
    )
