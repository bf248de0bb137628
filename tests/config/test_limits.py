"""Every number of a recipe has finite limits with a reason; nothing beyond them is accepted."""

from __future__ import annotations

import math

import pytest

from tawin_nemo.config.fields import leaf_fields
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import Recipe
from tawin_nemo.util.errors import ConfigError

NUMBERS = {key: item for key, item in leaf_fields(Recipe) if item.type in ("int", "float", "list[int]")}


def refusal(key: str, value: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_recipe(None, [f"{key}={value}"])
    return str(refused.value)


def test_there_are_numbers() -> None:
    assert len(NUMBERS) > 120
    assert {str(item.type) for item in NUMBERS.values()} == {"int", "float", "list[int]"}


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_has_finite_limits_with_a_reason(key: str) -> None:
    item = NUMBERS[key]
    low, high, why = (item.metadata[name] for name in ("low", "high", "why"))
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low < high
    assert len(why.split()) >= 3
    kind = str(item.type)
    values = {"int": [high + 1, low - 1, 10**30], "float": [2 * high + 1, low - 1, 1e300]}
    for value in values.get(kind, [high + 1]):
        assert key in refusal(key, str(value) if kind != "list[int]" else f"[{value}]")
    beyond = f"[{high + 1}]" if kind == "list[int]" else str(2 * high + 1)
    assert why in refusal(key, beyond)


@pytest.mark.parametrize("key", [key for key, item in NUMBERS.items() if item.type == "float"])
@pytest.mark.parametrize("value", ["nan", ".nan", "inf", "-inf", ".inf", "1e999"])
def test_a_number_is_finite(key: str, value: str) -> None:
    assert key in refusal(key, value)


def test_threads_that_would_exhaust_the_machine_are_refused() -> None:
    text = refusal("trainer.threads", "2147483648")
    assert "must be in 0..1024, because no machine has more cores" in text
