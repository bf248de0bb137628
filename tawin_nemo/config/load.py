"""YAML recipes and dotted overrides -> one checked, frozen ``Recipe``.

OmegaConf reads, merges, interpolates and converts; this file adds what a person needs when something is wrong: the
key, the value seen, the remedy and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader  # its YAML without its containers, which are slow
from omegaconf.errors import OmegaConfBaseException

from tawin_nemo.config.backbones import backbone
from tawin_nemo.config.checks import combinations
from tawin_nemo.config.fields import leaf_fields, value_of
from tawin_nemo.config.reading import FREE_FORM, read_layers, read_overrides
from tawin_nemo.config.schema import Recipe
from tawin_nemo.config.seams import names_in, reward_terms
from tawin_nemo.util import times
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.imports import is_import_path

#: Control characters, and the two marks without width that come along when text is copied.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b\ufeff]")
#: The longest path of Linux, and more than any other text of a recipe.
_LONGEST = 4095
#: Sections that are compared as one value; the hashes of ``code`` are compared one by one.
_WHOLE = tuple(section for section in FREE_FORM if section != "code")
#: Keys that hold dates or durations as text, with the function that reads them.
TIMES = {
    "trainer.max_time": times.duration, "prepare.start": times.first_second, "prepare.end": times.last_second,
    "prepare.valid_start": times.first_second, "prepare.test_start": times.first_second, "retrain.date": times.day,
}  # fmt: skip


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in ``path`` (None = all defaults), its one ``base:`` below it and ``overrides`` above it.

    Raises ConfigError for a missing file, unknown key, wrong type, value out of limits or impossible combination.
    """
    recipe = read_recipe(path, overrides)
    check(recipe)
    return recipe


def read_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """``load_recipe`` without ``check``: keys and types are right, limits and combinations may not be."""
    layers = [] if path is None else read_layers(Path(path))
    layers.append(read_overrides(overrides))
    for layer in layers:
        _sft_for_rl(layer)
        _expand_home(layer)
    merged: Any = _defaults()
    try:
        for layer in layers:
            merged = OmegaConf.merge(merged, layer)  # a copy each time
        OmegaConf.resolve(merged)
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or _unresolvable(merged) or _referring(layers) or "a value"
        field = dict(leaf_fields(Recipe)).get(key)
        meaning = f" ({key}: {field.metadata['help']})" if field else ""
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}{meaning}") from None
    assert isinstance(recipe, Recipe)
    return recipe


def _referring(layers: Sequence[DictConfig]) -> str:
    """The keys whose values refer to other keys."""
    found: list[str] = []

    def visit(written: Any, prefix: str) -> None:
        for name, value in written.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{name}.")
            elif "${" in str(value):
                found.append(f"{prefix}{name}={value}")

    for layer in layers:
        visit(OmegaConf.to_container(layer, resolve=False), "")
    return ", ".join(found)


def _unresolvable(merged: Any) -> str:
    """The first key whose value refers to a key that does not exist."""
    for key, _ in leaf_fields(Recipe):
        try:
            OmegaConf.select(merged, key)
        except OmegaConfBaseException:
            return key
    return ""


def _sft_for_rl(layer: DictConfig) -> None:
    """``rl.init=sft`` asks for SFT, also over a file with ``sft.enabled: false``; the same layer may say otherwise."""
    written: Any = OmegaConf.to_container(layer, resolve=False)  # references are resolved when all layers are merged
    rl, sft = (written.get(name) if isinstance(written.get(name), dict) else {} for name in ("rl", "sft"))
    if rl.get("init") == "sft" and sft.get("enabled") is None:
        OmegaConf.update(layer, "sft.enabled", True)


@cache
def _defaults() -> DictConfig:
    """All keys with their defaults, to be merged into copies; frozen dataclasses would be read-only."""
    defaults: DictConfig = OmegaConf.structured(Recipe)
    for node in (defaults, *_sections(defaults)):
        OmegaConf.set_readonly(node, False)
    return defaults


def _expand_home(layer: DictConfig) -> None:
    """``~/`` at the beginning of a text is the home folder, wherever a layer names a path."""

    def visit(written: Any, prefix: str) -> None:
        for name, value in written.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{name}.")
            elif isinstance(value, str) and _at_home(value) != value:
                OmegaConf.update(layer, f"{prefix}{name}", _at_home(value))
            elif isinstance(value, list):
                parts = [_at_home(part) if isinstance(part, str) else part for part in value]
                if parts != value:
                    OmegaConf.update(layer, f"{prefix}{name}", parts)

    visit(OmegaConf.to_container(layer, resolve=False), "")


def _at_home(text: str) -> str:
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def _sections(node: Any) -> Iterator[DictConfig]:
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            yield child
            yield from _sections(child)


def check(recipe: Recipe) -> None:
    """Limits of single values, then combinations. Raises ConfigError."""
    check_values(recipe)
    backbone(recipe.model.backbone)
    for wrong, message in combinations(recipe):
        if wrong:
            raise ConfigError(message)


def check_values(recipe: Recipe) -> None:
    """Every value by itself: readable text, names that exist, numbers in their limits, dates. Raises ConfigError."""
    for key, item in leaf_fields(Recipe):
        value = value_of(recipe, key)
        _check_text(key, value)
        if "choices" in item.metadata:
            check_names(key, value, item.metadata["choices"], imports=item.metadata["imports"])
        _check_limits(key, value, item.metadata)
    for key, parse in TIMES.items():
        try:
            parse(value_of(recipe, key))
        except ValueError as error:
            raise ConfigError(f"{key}={value_of(recipe, key)} {error}") from None


def _check_text(key: str, value: Any) -> None:
    """Raises ConfigError for a text, or a text of a list, with something in it that nobody sees."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and (text != text.strip() or _UNSEEN.search(text)):
            raise ConfigError(
                f"{key}={text!r} has blanks at an end, or a control character or mark that cannot be seen; write "
                f"{_UNSEEN.sub('', text).strip()!r}"
            )
        if isinstance(text, str) and len(text) > _LONGEST:
            raise ConfigError(f"{key}={text[:40]}... has {len(text)} characters; a path has at most {_LONGEST}")


def check_names(key: str, value: Any, choices: Sequence[str], *, imports: bool) -> None:
    """Raises ConfigError unless ``value`` consists of names out of ``choices``, or of import paths where those may be.

    Whether an import path leads anywhere is looked up later, by the verbs that use it (``seams.imported``).
    """
    if key == "rl.reward":
        try:
            reward_terms(value)
        except ValueError as error:
            raise ConfigError(f"{key}={value} {error}; the names are {', '.join(choices)}") from None
    for name in names_in(key, value):
        if name in choices or (imports and is_import_path(str(name))):
            continue
        near = difflib.get_close_matches(str(name), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        path = "an import path such as package.module:name"
        if not choices:
            raise ConfigError(f"{key}={name} is not {path}")
        known = f"one of {', '.join(choices)}" + (f", or {path}" if imports else "")
        raise ConfigError(f"{key}={name} is not {known}{hint}")


def _check_limits(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raises ConfigError for a number, or a number of a list, that is not finite or out of its limits."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{key}={number} is no finite number ({metadata['help']})")
        if (high := metadata.get("high")) is None:
            continue
        low = metadata["low"]
        if number < low or number > high:
            reason = f", because {metadata['why']}" if number > high else ""
            raise ConfigError(
                f"{key}={number} is out of limits; it must be in {low}..{high}{reason} ({metadata['help']})"
            )


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as it is stored in a run directory."""
    return str(
        yaml.dump(
            dataclasses.asdict(recipe), default_flow_style=False, allow_unicode=True, sort_keys=False,
            Dumper=get_omega_conf_dumper(),
        )
    )  # fmt: skip


def differences(old: str, new: str, ignore: Sequence[str] = ()) -> list[str]:
    """Dotted keys whose values differ between two resolved recipes, as ``key: old -> new``.

    A key that ``old`` does not know had its default: it is younger than that recipe.
    """

    def flat(text: str) -> dict[str, Any]:
        result: dict[str, Any] = {}

        def visit(node: Any, prefix: str) -> None:
            for name, value in node.items():
                if isinstance(value, dict) and f"{prefix}{name}" not in _WHOLE:
                    visit(value, f"{prefix}{name}.")
                else:
                    result[f"{prefix}{name}"] = value

        visit(yaml.load(text, Loader=get_yaml_loader()) or {}, "")
        return result

    before, after = flat(to_yaml(Recipe())) | flat(old), flat(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted({*before, *after})
        if key not in ignore and before.get(key) != after.get(key)
    ]
