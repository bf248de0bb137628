"""The verbs prepare and tokenize: raw data -> Parquet, and item texts -> semantic IDs."""

from __future__ import annotations

import contextlib
from typing import Any

from tawin_nemo.config.schema import Recipe
from tawin_nemo.run.datasets import prepared_root, prepares, run_dir_of
from tawin_nemo.run.run_lock import run_lock


def prepare_or_tokenize(recipe: Recipe, verb: str) -> dict[str, Any]:
    """The two verbs that need no process group; they hold the lock of the run directory while they write there."""
    with contextlib.ExitStack() as stack:
        if verb == "tokenize" or prepares(recipe):
            stack.enter_context(run_lock(run_dir_of(recipe), verb))
        root = prepared_root(recipe)
        if verb == "prepare":
            return {"prepared": str(root)}
        from tawin_nemo.commands.tokenize import checkpoint_of, output_of, tokenize, vectors_of

        out = output_of(recipe)
        stack.enter_context(
            run_lock(out.parent, verb, outputs=[out.name, vectors_of(out).name, checkpoint_of(out).name])
        )
        return tokenize(recipe, root)
