"""Combinations of keys of section ``preference`` that make no sense, each with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Iterator

from tawin_nemo.config.schema import Recipe


def prefers_reference(r: Recipe) -> bool:
    """Preference optimisation runs and compares the policy with a reference."""
    return r.preference.enabled and r.preference.uses_reference and r.reference.mode != "off"


def preference_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    """(is wrong, message) of every combination that makes no sense; the message names a remedy."""
    p = r.preference
    yield (
        not (r.sft.enabled or p.enabled or r.rl.enabled or r.compare.zero_shot),
        "sft.enabled=false and rl.enabled=false: nothing to train; set one of them (or preference.enabled) to true, or "
        "compare.zero_shot=true to evaluate the model as it is",
    )
    yield (
        r.rl.enabled and r.rl.init == "preference" and not p.enabled,
        "rl.init=preference but preference.enabled=false; set preference.enabled=true or rl.init=sft",
    )
    if not p.enabled:
        return
    yield (
        p.init == "sft" and not r.sft.enabled,
        "preference.init=sft but sft.enabled=false; set preference.init=base or sft.enabled=true",
    )
    yield (p.beta == 0, "preference.beta=0 has no gradient; set it above 0")
    yield (
        p.max_steps == 0 and p.epochs == 0,
        "preference.max_steps=0 and preference.epochs=0: no step would be taken; set one of them, or "
        "preference.enabled=false",
    )
    yield (
        p.uses_reference and r.reference.mode == "off",
        f"preference.algorithm={p.algorithm} needs a reference but reference.mode=off; set reference.mode=copy, or "
        "preference.algorithm=napo or simpo",
    )
    yield (
        r.reference.refresh != "off" and not r.rl.enabled and not prefers_reference(r),
        f"reference.refresh={r.reference.refresh} but preference.algorithm={p.algorithm} has no reference; "
        "set reference.refresh=off",
    )
    yield (
        p.negatives == "candidates" and p.num_negatives >= p.num_candidates,
        f"preference.num_negatives={p.num_negatives} of preference.num_candidates={p.num_candidates}, of which one is "
        f"the target; set preference.num_negatives to {p.num_candidates - 1} or less",
    )
    yield (
        p.length_norm == "branching" and p.policy_space == "vocab",
        "preference.length_norm=branching counts branching tokens, which only preference.policy_space=trie scores; "
        "use full",
    )
    yield (
        p.search_every > 0 and p.negatives not in ("beam", "self_play"),
        f"preference.search_every={p.search_every} is not used by preference.negatives={p.negatives}; set it to 0",
    )
    yield from _aux_combinations(r)


def _aux_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    p = r.preference
    yield (
        p.group_rows > p.global_batch_size,
        f"preference.share_group={p.share_group} is larger than preference.global_batch_size={p.global_batch_size}; "
        f"set preference.share_group to {p.global_batch_size} or less",
    )
    yield (
        not p.aux and p.group_rows > 1,
        f"preference.rho={p.rho} shares rejected items among similar users, which needs preference.aux, the directory "
        "of a finished baseline (RUN_DIR/sasrec; train one with baseline.model=sasrec), or preference.rho=0",
    )
    yield (
        not p.aux and p.uses_margin_of_aux,
        "preference.margin=dynamic needs preference.aux, the directory of a finished baseline (RUN_DIR/sasrec; train "
        "one with baseline.model=sasrec), or preference.margin=fixed",
    )
    yield (
        bool(p.aux) and p.algorithm not in ("napo", "rosepo"),
        f"preference.aux={p.aux} is not used by preference.algorithm={p.algorithm}; leave it empty",
    )
