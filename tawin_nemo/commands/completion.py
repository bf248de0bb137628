"""Tab completion: ``eval "$(register-python-argcomplete tawin-nemo)"`` in the shell's start file switches it on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any


def complete(parser: argparse.ArgumentParser, recipe: argparse.Action, keys: argparse.Action) -> None:
    """Answer the shell's question and end the process: verbs, options, recipe files, keys and their choices."""
    import argcomplete

    recipe.completer = argcomplete.completers.FilesCompleter(("yaml", "yml"))  # type: ignore[attr-defined]
    keys.completer = words  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, append_space=False)


def words(prefix: str, **_: Any) -> Iterator[str]:
    """``key=`` for every key that begins with ``prefix``; after the ``=`` the key's choices."""
    from tawin_nemo.config.fields import leaf_fields
    from tawin_nemo.config.schema import Recipe

    named, equals, _rest = prefix.partition("=")
    for key, item in leaf_fields(Recipe):
        if not equals:
            yield f"{key}="
        elif key == named:
            options = item.metadata.get("choices") or (("true", "false") if item.type == "bool" else ())
            yield from (f"{key}={option}" for option in options)
