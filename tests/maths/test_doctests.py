"""The examples in the docstrings of maths are right."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("advantages", "policy_loss", "ranking", "rewards", "tawin")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"tawin_nemo.maths.{name}")
    outcome = doctest.testmod(module, extraglobs={"torch": importlib.import_module("torch")})
    assert outcome.attempted > 0
    assert outcome.failed == 0
