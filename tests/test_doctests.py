"""Every example in a docstring is run."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for name in ("tawin_nemo", "data_prep") for path in (ROOT / name).rglob("*.py"))
WITH_EXAMPLES = [path for path in FILES if ">>> " in path.read_text(encoding="utf-8")]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in WITH_EXAMPLES]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_formulas_have_examples():
    assert {"tawin_nemo.maths.tawin", "tawin_nemo.maths.rewards", "tawin_nemo.maths.ranking"} <= set(MODULES)
