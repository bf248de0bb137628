"""The verbs that need no process group: prepare, tokenize and score."""

from __future__ import annotations

import contextlib
from typing import Any

from tawin_nemo.config.schema import Recipe
from tawin_nemo.run.datasets import prepared_root, prepares, run_dir_of
from tawin_nemo.run.run_lock import run_lock


def in_one_process(recipe: Recipe, verb: str) -> dict[str, Any]:
    """Run prepare, tokenize or score; they hold the lock of the run directory while they write data there."""
    with contextlib.ExitStack() as stack:
        if verb == "tokenize" or prepares(recipe):
            stack.enter_context(run_lock(run_dir_of(recipe), verb))
        root = prepared_root(recipe)
        if verb == "prepare":
            return {"prepared": str(root)}
        if verb == "score":
            from tawin_nemo.commands.score import score

            return score(recipe, root)
        from tawin_nemo.commands.tokenize import checkpoint_of, output_of, tokenize, vectors_of

        out = output_of(recipe)
        stack.enter_context(
            run_lock(out.parent, verb, outputs=[out.name, vectors_of(out).name, checkpoint_of(out).name])
        )
        return tokenize(recipe, root)
