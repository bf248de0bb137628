"""YAML files and ``key=value`` overrides -> layers of a recipe, with every value read as the type of its key.

YAML guesses a type from how a word looks: ``name: 007`` becomes a number, ``yes`` a truth value and ``1:00:00:00`` a
sexagesimal number. Here the key's type decides. Text stays as it was written; an empty value clears a text or a list;
a list may be written ``[1,3,5]`` or ``1,3,5``.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import Field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader  # YAML 1.1 with 1e-5 as a number and without double keys

from tawin_nemo.config.fields import leaf_fields, sections
from tawin_nemo.config.schema import Recipe
from tawin_nemo.util.errors import ConfigError

FREE_FORM = ("exp_manager", "code")  # sections whose keys are not the recipe's
_CLEARED = ("str", "list[str]", "list[int]")  # types of keys that an empty value clears
_STR, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


def read_layers(path: Path) -> list[DictConfig]:
    """The layers of a recipe file, its ``base:`` first. Raises ConfigError as ``load_recipe`` does."""
    layer = read_yaml(path)
    base_name = layer.pop("base", None)
    layers = [layer]
    if base_name is not None:
        base_path = path.parent / str(base_name)
        base = read_yaml(base_path)
        if "base" in base:
            raise ConfigError(f"base={base_name} in {path} has a base itself; recipes inherit one level only")
        layers.insert(0, base)
        check_keys(base, str(base_path))
    check_keys(layer, str(path))
    return layers


def read_yaml(path: Path) -> DictConfig:
    """The keys of one file. Raises ConfigError for a missing file, invalid YAML, or YAML that holds no keys."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"recipe file not found: {path}{hint}")
    try:
        loaded = OmegaConf.create(_parsed(path.read_text(encoding="utf-8")) or {})
    except Exception as error:  # yaml raises many types; each is a mistake in the file
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold `key: value` lines, found a list")
    return loaded


def read_overrides(overrides: Sequence[str]) -> DictConfig:
    """The layer of a command line's ``key=value`` words. Raises ConfigError for a word that cannot be read."""
    layer = OmegaConf.create({})
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {item!r} has no '='; write key=value, for example rl.lr=1e-5")
        if not all(key.split(".")):
            raise ConfigError(
                f"override {item!r}: {key} has a dot too many; write words with single dots between, as rl.lr"
            )
        if not text and (kind := _types().get(key, "str")) not in _CLEARED:
            raise ConfigError(f"{item} is empty, but {key} is of type {kind}; leave it out to keep its default")
        try:
            OmegaConf.update(layer, key, _value(key, text), force_add=True)
        except Exception as error:  # a value that YAML or OmegaConf cannot parse
            raise ConfigError(f"override not understood: {item!r}: {str(error).splitlines()[0]}") from None
    check_keys(layer, "the command line")
    return layer


def _value(key: str, text: str) -> Any:
    """``text`` as the type of ``key``; keys of no known type (sections, other libraries' keys) are YAML."""
    kind = _types().get(key)
    if kind in _CLEARED and text[:1] not in ("[", "'", '"'):
        if kind == "str":
            return text
        return [part.strip() for part in text.split(",")] if text.strip() else []
    return _parsed(text, key)


def _parsed(text: str, prefix: str = "") -> Any:
    """YAML ``text``, the value of key ``prefix`` (empty = a whole recipe), with scalars of text keys as text."""
    loader = get_yaml_loader()(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _keep_text(root, prefix)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _keep_text(node: yaml.Node, key: str) -> None:
    """Tag scalars below ``node`` as text where the recipe says that key ``key`` holds text."""
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            if isinstance(name, yaml.ScalarNode):
                _keep_text(child, f"{key}.{name.value}" if key else name.value)
        return
    kind = _types().get(key, "")
    if isinstance(node, yaml.SequenceNode) and kind == "list[str]":
        for child in node.value:
            if isinstance(child, yaml.ScalarNode):
                child.tag = _STR
    elif isinstance(node, yaml.ScalarNode) and kind == "str":
        if node.tag == _NULL and node.value in ("", "~", "null"):
            node.value = ""
        node.tag = _STR


@cache
def _types() -> dict[str, str]:
    """The type of every key, as the schema writes it."""
    return {key: str(item.type) for key, item in leaf_fields(Recipe)}


def check_keys(layer: DictConfig, where: str) -> None:
    """Raises ConfigError for a key that no recipe has, with the nearest one; a false that was ``off`` becomes that."""
    valid: dict[str, Field[Any]] = dict(leaf_fields(Recipe))
    known_sections = sections(valid)

    def visit(node: DictConfig, prefix: str) -> None:
        for name in node:
            key = prefix + str(name)
            child: Any = node._get_node(name)
            if key in FREE_FORM:
                continue
            if key in known_sections:
                if not isinstance(child, DictConfig):
                    raise ConfigError(f"{key}={shown(child)} in {where}: {key} is a section; set {key}.SOMETHING")
                visit(child, f"{key}.")
            elif key not in valid:
                hint = nearest(key, [*valid, *known_sections])
                raise ConfigError(f"unknown key {key}={shown(child)} in {where}; {hint}")
            elif shown(child) == "???":
                raise ConfigError(
                    f"{key}=??? in {where} stands for a value that is missing; write one, or leave it out"
                )
            elif valid[key].type in ("bool", "float"):
                _check_scalar(key, shown(child), str(valid[key].type))
            elif "off" in valid[key].metadata.get("choices", ()) and shown(child).lower() in ("false", "no"):
                node[name] = "off"

    visit(layer, "")


def _check_scalar(key: str, text: str, kind: str) -> None:
    """Raises ConfigError for a number other than 0 and 1 as a truth value, and for one that no float can hold."""
    try:
        number = int(text)
    except ValueError:  # not a whole number: OmegaConf looks at it
        return
    if kind == "bool" and number not in (0, 1):
        raise ConfigError(f"{key}={text} is no truth value; write true or false")
    if abs(number) > sys.float_info.max:
        raise ConfigError(f"{key}={text[:20]}... has {len(text)} digits; no number of this kind is so large")


def shown(node: Any) -> str:
    """A value as an error message shows it."""
    return "{...}" if isinstance(node, DictConfig) else str(getattr(node, "_val", node))


def nearest(key: str, valid: Sequence[str]) -> str:
    """A hint at the valid keys that ``key`` may mean."""
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    same_leaf = [other for other in valid if other.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    best = same_leaf or near
    return f"did you mean {' or '.join(best[:3])}?" if best else "`tawin-nemo keys` lists all keys"
