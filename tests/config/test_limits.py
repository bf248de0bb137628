"""Every number of a recipe has finite limits with a reason; nothing beyond them is accepted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from tawin_nemo.config.fields import leaf_fields
from tawin_nemo.config.load import check, load_recipe
from tawin_nemo.config.schema import Recipe
from tawin_nemo.util.errors import ConfigError

NUMBERS = {key: item for key, item in leaf_fields(Recipe) if item.type in ("int", "float", "list[int]")}


def with_value(node: Any, key: str, value: Any) -> Any:
    """``node`` with dotted ``key`` set."""
    name, _, rest = key.partition(".")
    return replace(node, **{name: with_value(getattr(node, name), rest, value) if rest else value})


def refusal(key: str, value: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        check(with_value(Recipe(), key, [value] if NUMBERS[key].type == "list[int]" else value))
    return str(refused.value)


def test_there_are_numbers_of_every_kind() -> None:
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
    for value in (high + 1, 10 * high + 10, 10**30):
        assert refusal(key, value) == (
            f"{key}={value} is out of limits; it must be in {low}..{high}, because {why} ({item.metadata['help']})"
        )
    assert key in refusal(key, low - 1)
    if item.type == "float":
        for value in (math.nan, math.inf, -math.inf):
            assert refusal(key, value).startswith(f"{key}={value} is no finite number")


@pytest.mark.parametrize("word", ["nan", ".nan", "inf", "-.inf", "1e999"])
def test_words_for_what_is_no_number_are_refused(word: str) -> None:
    for key in ("rl.lr", "trainer.clip_grad"):
        with pytest.raises(ConfigError, match=key):
            load_recipe(None, [f"{key}={word}"])


def test_threads_that_would_exhaust_the_machine_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be in 0\.\.1024, because no machine has more cores"):
        load_recipe(None, ["trainer.threads=2147483648"])


def test_a_reference_to_another_key_is_resolved_or_refused() -> None:
    assert load_recipe(None, ["rl.max_steps=${seed}"]).rl.max_steps == Recipe().seed
    for word in ("rl.kl=${seed}", "rl.lr=${nothing}"):
        with pytest.raises(ConfigError, match=word.partition("=")[0]):
            load_recipe(None, [word])
