"""How much work a recipe's steps are, from mean lengths that the caller states.

A rollout may run fewer tokens than this says (candidates share beginnings, forced tokens are never run): figures are
upper bounds for equal prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tawin_nemo.config.backbones import FlopCount
from tawin_nemo.config.schema import Recipe
from tawin_nemo.tools.plan.activations import Pass

#: Admissible next tokens at a place with a choice, mean. Head rows of these are all that trie space multiplies.
CHILDREN = 16


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt, of an item with its end-of-text token, and those of an item up to its last choice in
    the trie: trie space runs and scores only these."""

    prompt: int
    path: int
    decisions: int

    def run(self, space: str) -> int:
        """Tokens of an item that are run: in vocabulary space all but the last, which is never an input."""
        return max(1, self.decisions if space == "trie" else self.path - 1)

    def scored(self, space: str) -> int:
        """Tokens of an item that have a log-prob."""
        return max(1, self.decisions if space == "trie" else self.path)


#: Where none are given. Titles: the Industrial set in Qwen's tokenizer, items of 29 tokens; semantic IDs: 4 codes.
TITLES, CODES = Lengths(256, 29, 4), Lengths(96, 5, 4)


def default_lengths(recipe: Recipe) -> Lengths:
    """The lengths that are assumed for a recipe whose data nobody has looked at."""
    usual = CODES if recipe.catalog.kind == "sid" else TITLES
    return replace(usual, prompt=min(usual.prompt, recipe.data.max_prompt_tokens))


def tree_pass(tokens: int, lengths: Lengths, candidates: int, space: str) -> Pass:
    """A micro-batch of ``tokens`` tokens of prompts with the trees of their candidates (one candidate: no tree)."""
    below = candidates * lengths.run(space)
    keys = lengths.prompt + below
    prompts = tokens / keys
    return Pass(
        tokens,
        tree=round(prompts * below) if candidates > 1 else 0,
        keys=keys,
        scored=round(prompts * candidates * lengths.scored(space)),
        vocabulary=space == "vocab",
    )


def sft_pass(recipe: Recipe, lengths: Lengths) -> Pass:
    """A full micro-batch of SFT: plain rows."""
    return tree_pass(recipe.sft.micro_batch_tokens, lengths, 1, recipe.sft.loss_space)


def rl_pass(recipe: Recipe, lengths: Lengths) -> Pass:
    """A full micro-batch of the actor's update."""
    return tree_pass(recipe.rl.micro_batch_tokens, lengths, recipe.rl.group_size, recipe.rl.policy_space)


def preference_pass(recipe: Recipe, lengths: Lengths) -> Pass:
    """A full micro-batch of preference optimisation: the target and the rejected items of each prompt."""
    cfg = recipe.preference
    return tree_pass(cfg.micro_batch_tokens, lengths, 1 + cfg.num_negatives, cfg.policy_space)


def rows_work(rows: int, lengths: Lengths, candidates: int, space: str, vocab: int) -> FlopCount:
    """One forward pass over ``rows`` prompts with ``candidates`` items below each."""
    prompt, run = lengths.prompt, lengths.run(space)
    pairs = prompt * (prompt + 1) / 2 + candidates * run * (prompt + (run + 1) / 2)
    logits = candidates * lengths.scored(space) * (vocab if space == "vocab" else CHILDREN)
    return FlopCount(rows * (prompt + candidates * run), rows * pairs, rows * logits)


def sft_step_work(recipe: Recipe, lengths: Lengths, vocab: int, rows: int) -> FlopCount:
    """Forward pass of ``rows`` rows of one SFT step."""
    return rows_work(rows, lengths, 1, recipe.sft.loss_space, vocab)


def preference_step_work(recipe: Recipe, lengths: Lengths, vocab: int, rows: int) -> FlopCount:
    """Forward pass of ``rows`` rows of one preference step; sharing rejected items costs nothing."""
    cfg = recipe.preference
    return rows_work(rows, lengths, 1 + cfg.num_negatives, cfg.policy_space, vocab)


@dataclass(frozen=True)
class RlWork:
    """Forward passes of one RL step; an update costs three times its forward pass, ``updates`` times."""

    rollout: FlopCount
    reference: FlopCount
    scoring: FlopCount  # old log-probs, where the rollout does not leave them
    update: FlopCount
    updates: int


def rl_step_work(recipe: Recipe, lengths: Lengths, vocab: int, prompts: int) -> RlWork:
    """What one RL step runs for ``prompts`` prompts."""
    rl, nothing = recipe.rl, FlopCount()
    width = recipe.rollout.width or rl.group_size
    if rl.negatives == "dynamic":
        width = round(width * rl.oversample)
    searched = search_space(recipe)
    scored = rows_work(prompts, lengths, rl.group_size, rl.policy_space, vocab)
    return RlWork(
        rollout=rows_work(prompts, lengths, width, searched, vocab),
        reference=scored if rl.beta > 0 and uses_reference(recipe) else nothing,
        scoring=scored if searched != rl.policy_space or rl.importance_cap > 0 else nothing,
        update=scored,
        updates=rl.inner_updates,
    )


def search_space(recipe: Recipe) -> str:
    """The space that rollouts rank or draw in."""
    return recipe.rollout.score_space if recipe.rl.negatives == "beam" else "trie"


def uses_reference(recipe: Recipe) -> bool:
    """Whether RL or preference optimisation scores its candidates with a reference."""
    preference = recipe.preference.enabled and recipe.preference.uses_reference
    return ((recipe.rl.enabled and recipe.rl.beta > 0) or preference) and recipe.reference.mode != "off"
