"""The keys of a recipe: dotted names, their dataclass fields and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, get_type_hints

from tawin_nemo.config.schema import Recipe


def leaf_fields(cls: type) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every dotted key below ``cls`` with its dataclass field."""
    return iter(_leaf_fields(cls))


@cache
def _leaf_fields(cls: type) -> tuple[tuple[str, dataclasses.Field[Any]], ...]:
    return tuple(_below(cls, ""))


def _below(cls: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _below(kind, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of dotted ``key``."""
    node: Any = recipe
    for part in key.split("."):
        node = getattr(node, part)
    return node


def sections(keys: Iterable[str]) -> set[str]:
    """Every section that ``keys`` lie in, ``rl.tawin`` and ``rl`` for ``rl.tawin.k``."""
    parts = [key.split(".") for key in keys]
    return {".".join(names[:depth]) for names in parts for depth in range(1, len(names))}
