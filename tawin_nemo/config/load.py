"""YAML recipes and dotted overrides -> one checked, frozen ``Recipe``.

OmegaConf reads, merges, interpolates and converts; this file adds what a person needs when something is wrong: the
key, the value seen, the remedy and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tawin_nemo.config.backbones import backbone
from tawin_nemo.config.checks import combinations
from tawin_nemo.config.schema import Recipe
from tawin_nemo.util.errors import ConfigError

FREE_FORM = ("exp_manager",)  # sections whose keys belong to another library


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in ``path`` (None = all defaults), its one ``base:`` below it and ``overrides`` above it.

    Raises ConfigError for a missing file, unknown key, wrong type, value out of limits or impossible combination.
    """
    recipe = read_recipe(path, overrides)
    check(recipe)
    return recipe


def read_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """``load_recipe`` without ``check``: keys and types are right, limits and combinations may not be."""
    layers = [] if path is None else _read_layers(Path(path))
    layers.append(_read_overrides(overrides))
    for layer in layers:
        _sft_for_rl(layer)
    merged: Any = OmegaConf.structured(Recipe)
    OmegaConf.set_readonly(merged, False)
    try:
        for layer in layers:
            merged = _merge(merged, layer)
        OmegaConf.resolve(merged)
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        field = dict(leaf_fields(Recipe)).get(key)
        meaning = f" ({key}: {field.metadata['help']})" if field else ""
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}{meaning}") from None
    assert isinstance(recipe, Recipe)
    return recipe


def _sft_for_rl(layer: DictConfig) -> None:
    """``rl.init=sft`` asks for SFT, also over a file with ``sft.enabled: false``; the same layer may say otherwise."""
    if OmegaConf.select(layer, "rl.init") == "sft" and OmegaConf.select(layer, "sft.enabled") is None:
        OmegaConf.update(layer, "sft.enabled", True)


def _merge(base: Any, layer: DictConfig) -> Any:
    """Structured configs of frozen dataclasses are read-only by type; merging needs the flag off."""
    OmegaConf.set_readonly(base, False)
    for node in _sections(base):
        OmegaConf.set_readonly(node, False)
    return OmegaConf.merge(base, layer)


def _sections(node: Any) -> Iterator[DictConfig]:
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            yield child
            yield from _sections(child)


def _read_layers(path: Path) -> list[DictConfig]:
    layer = _read_yaml(path)
    base_name = layer.pop("base", None)
    layers = [layer]
    if base_name is not None:
        base_path = path.parent / str(base_name)
        base = _read_yaml(base_path)
        if "base" in base:
            raise ConfigError(f"base={base_name} in {path} has a base itself; recipes inherit one level only")
        layers.insert(0, base)
        _check_keys(base, str(base_path))
    _check_keys(layer, str(path))
    return layers


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"recipe file not found: {path}{hint}")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # yaml raises many types; each is a mistake in the file
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold `key: value` lines, found a list")
    return loaded


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override {item!r} has no '='; write key=value, for example rl.lr=1e-5")
    try:
        layer = OmegaConf.from_dotlist(list(overrides))
    except Exception as error:  # a value that YAML cannot parse
        raise ConfigError(f"override not understood: {error}") from None
    _check_keys(layer, "the command line")
    return layer


def _check_keys(layer: DictConfig, where: str) -> None:
    valid = dict(leaf_fields(Recipe))
    sections = {key.rsplit(".", 1)[0] for key in valid if "." in key}

    def visit(node: DictConfig, prefix: str) -> None:
        for name in node:
            key = prefix + str(name)
            child = node._get_node(name)
            if key in FREE_FORM:
                continue
            if key in sections:
                if not isinstance(child, DictConfig):
                    raise ConfigError(f"{key}={node[name]} in {where}: {key} is a section; set {key}.SOMETHING")
                visit(child, f"{key}.")
            elif key in valid:
                if node[name] is False and "off" in valid[key].metadata.get("choices", ()):
                    node[name] = "off"  # YAML reads a bare off as false
            else:
                raise ConfigError(f"unknown key {key}={_shown(child)} in {where}; {_nearest(key, [*valid, *sections])}")

    visit(layer, "")


def _shown(node: Any) -> str:
    return "{...}" if isinstance(node, DictConfig) else str(node)


def _nearest(key: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    same_leaf = [other for other in valid if other.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    best = same_leaf or near
    return f"did you mean {' or '.join(best[:3])}?" if best else "`tawin-nemo keys` lists all keys"


def leaf_fields(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every dotted key below ``cls`` with its dataclass field."""
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from leaf_fields(kind, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


def value_of(recipe: Recipe, key: str) -> Any:
    node: Any = recipe
    for part in key.split("."):
        node = getattr(node, part)
    return node


def check(recipe: Recipe) -> None:
    """Limits of single values, then combinations. Raises ConfigError."""
    for key, item in leaf_fields(Recipe):
        value = value_of(recipe, key)
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key}={value} is not one of {', '.join(choices)}{hint}")
        low, high = item.metadata.get("low"), item.metadata.get("high")
        if (low is not None and value < low) or (high is not None and value > high):
            limits = f">= {low}" if high is None else f"in {low}..{high}"
            raise ConfigError(f"{key}={value} is out of limits; it must be {limits} ({item.metadata['help']})")
    backbone(recipe.model.backbone)
    for wrong, message in combinations(recipe):
        if wrong:
            raise ConfigError(message)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as it is stored in a run directory."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)), sort_keys=False)


def differences(old: str, new: str, ignore: Sequence[str] = ()) -> list[str]:
    """Dotted keys whose values differ between two resolved recipes, as ``key: old -> new``.

    A key that ``old`` does not know had its default: it is younger than that recipe.
    """

    def flat(text: str) -> dict[str, Any]:
        result: dict[str, Any] = {}

        def visit(node: Any, prefix: str) -> None:
            for name, value in node.items():
                if isinstance(value, dict) and f"{prefix}{name}" not in FREE_FORM:
                    visit(value, f"{prefix}{name}.")
                else:
                    result[f"{prefix}{name}"] = value

        visit(OmegaConf.to_container(OmegaConf.create(text)), "")
        return result

    before, after = flat(to_yaml(Recipe())) | flat(old), flat(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted({*before, *after})
        if key not in ignore and before.get(key) != after.get(key)
    ]
