"""Fields of recipe dataclasses: ``opt`` is any value with a meaning, ``choice`` one word out of several, ``number`` has
limits."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def opt(default: Any, help: str) -> Any:
    metadata = {"help": help}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(default: str, *others: str, help: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": (default, *others)})


def number(default: float, low: float | None = None, high: float | None = None, *, help: str) -> Any:
    """A number with inclusive limits."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})
